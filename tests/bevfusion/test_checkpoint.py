"""Float checkpoints in every layout and wrapping, and those that don't fit."""

import pytest
import torch
from torch import nn

from bevfusion.checkpoint import load_checkpoint, read_file, to_spconv2_layout
from bevfusion.errors import InputError
from bevfusion.ops.sparse import SparseConv3d, SubMConv3d


def model(channels: tuple[int, int] = (4, 6)) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "sparse": SubMConv3d(*channels, 3, padding=1, bias=False),
            "square": SparseConv3d(channels[1], channels[1], 3, bias=False),
            "norm": nn.BatchNorm1d(channels[1]),
            "linear": nn.Linear(channels[1], 2),
        }
    )


def old_layout(state: dict) -> dict:
    return {k: v.permute(1, 2, 3, 4, 0).contiguous() if v.dim() == 5 else v for k, v in state.items()}


def test_every_layout_and_wrapping_gives_the_same_weights(tmp_path):
    source = model().state_dict()
    plain = dict(source)
    variants = {
        "plain": plain,
        "metadata": source,
        "spconv 1": old_layout(plain),
        "wrapped": {"state_dict": old_layout(plain), "meta": {"epoch": 6}},
        "parallel": {"state_dict": {f"module.{k}": v for k, v in plain.items()}},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in plain.items()},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / "a.pth")
        target = model()
        for parameter in target.parameters():
            nn.init.constant_(parameter, 7.0)
        assert load_checkpoint(target, tmp_path / "a.pth").complete
        for key, value in target.state_dict().items():
            expected = plain[key].half().to(value) if name == "half" else plain[key]
            assert torch.equal(value, expected), (name, key)


def test_what_does_not_fit_is_listed_and_stops_the_load(tmp_path):
    state = dict(model().state_dict())
    state.pop("linear.bias")
    state["extra.weight"] = torch.ones(1)
    state["norm.weight"] = torch.ones(9)
    torch.save(state, tmp_path / "a.pth")
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(
        InputError, match=r"1 missing: linear.bias; 1 unexpected: extra.weight; 1 mis-shaped: norm.weight"
    ):
        load_checkpoint(target, tmp_path / "a.pth")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = load_checkpoint(target, tmp_path / "a.pth", allow_partial=True)
    assert (report.missing, report.unexpected, report.misshaped) == (
        ("linear.bias",),
        ("extra.weight",),
        ("norm.weight",),
    )


def test_counters_that_old_checkpoints_lack_are_not_missed(tmp_path):
    state = {k: v for k, v in model().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    assert load_checkpoint(model(), tmp_path / "a.pth").complete


def test_ambiguous_and_mixed_layouts_are_refused():
    square = nn.ModuleDict({"conv": SubMConv3d(3, 3, 3, bias=False)})
    with pytest.raises(InputError, match=r"conv.weight is ambiguous"):
        to_spconv2_layout(dict(square.state_dict()), square, "a.pth")
    mixed = nn.ModuleDict({"a": SubMConv3d(4, 6, 3, bias=False), "b": SubMConv3d(4, 6, 3, bias=False)})
    state = dict(mixed.state_dict())
    state["a.weight"] = state["a.weight"].permute(1, 2, 3, 4, 0)
    with pytest.raises(InputError, match="mixes sparse weight layouts"):
        to_spconv2_layout(state, mixed, "a.pth")


def test_an_ambiguous_weight_is_decided_by_the_others():
    net = nn.ModuleDict({"a": SubMConv3d(3, 3, 3, bias=False), "b": SubMConv3d(3, 5, 3, bias=False)})
    state = dict(net.state_dict())
    converted = to_spconv2_layout(old_layout(state), net, "a.pth")
    assert all(torch.equal(converted[k], state[k]) for k in state)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "object", "class", "nan"])
def test_unusable_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "a.pth"
    state = dict(model().state_dict())
    if damage == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "object":
        torch.save([1, 2], path)
    elif damage == "class":
        torch.save(model(), path)
    elif damage == "nan":
        state["linear.weight"][0, 0] = float("nan")
        torch.save(state, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(model(), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_and_its_part_named(tmp_path):
    """torch.load lets it pass."""
    path = tmp_path / "a.pth"
    state = {name: torch.zeros_like(value) + 0.5 for name, value in model().state_dict().items()}
    torch.save(state, path)
    data = path.read_bytes()
    position = data.index(b"\0\0\0?" * 8) + 3  # 0.5 is 00 00 00 3f
    path.write_bytes(data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :])
    with pytest.raises(
        InputError, match=r"a.pth is damaged, a/data/\d+ in it does not fit its checksum: copy it again"
    ):
        load_checkpoint(model(), path)


def test_pickled_classes_are_named_and_need_trust(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(model(), path)
    with pytest.raises(InputError, match=r"bevfusion.ops.sparse.S.*--trust-pickle"):
        read_file(path)
    assert isinstance(read_file(path, trust_pickle=True), nn.Module)
