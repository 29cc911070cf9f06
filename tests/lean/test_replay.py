"""Replays of a recorded forward: what runs, what is handed out, and that the model is as it was."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.layers import QuantConv2d
from lean.quantize import replace_to_quantization_module
from lean.replay import HeldWeight, replaying
from lean.switches import disable_quantization
from lean.values import copied, identity


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """Count the forwards of every module by name."""
    calls: Counter = Counter()
    hooks = [m.register_forward_hook(lambda *_, n=n: calls.update([n])) for n, m in model.named_modules()]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def changed(layer: nn.Module) -> Iterator[None]:
    """Let `layer` compute something else."""
    hook = layer.register_forward_hook(lambda _, __, output: output * 1.5)
    yield
    hook.remove()


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))


class Branches(nn.Module):
    """Two branches that meet, with functions between the modules."""

    def __init__(self):
        super().__init__()
        self.left = nn.ModuleDict({f"layer{i}": block() for i in (1, 2, 10)})
        self.right = nn.Sequential(block(), block())
        self.end = block()

    def forward(self, x: Tensor) -> Tensor:
        left = self.left["layer10"](self.left["layer2"](self.left["layer1"](x.flatten(0, 1))))
        return self.end(left * 2 + self.right(x.flatten(0, 1)))


def quantised(model: nn.Module) -> nn.Module:
    """`model` with quantised layers, all off."""
    replace_to_quantization_module(model)
    disable_quantization(model).apply()
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, 4, 5, 5)


@pytest.mark.parametrize(
    ("layer", "ran"),
    [
        ("left.layer1.0", {"left.layer1", "left.layer2", "left.layer10", "end"}),
        ("left.layer2.0", {"left.layer2", "left.layer10", "end"}),
        ("left.layer10.0", {"left.layer10", "end"}),
        ("right.1.0", {"right", "right.1", "end"}),
        ("end.0", {"end"}),
    ],
)
def test_only_what_depends_on_the_changed_layer_runs_and_gives_the_same(x, layer, ran):
    model = quantised(Branches())
    module = model.get_submodule(layer)
    with counted(model) as calls, replaying(model) as tape:
        tape.record(lambda: model(x))
        calls.clear()
        with changed(module):
            got = tape.replay(lambda: model(x), [layer])
        blocks = {"left.layer1", "left.layer2", "left.layer10", "right", "right.0", "right.1", "end"}
        assert blocks & set(calls) == ran
    with changed(module), torch.no_grad():
        assert torch.equal(got, model(x))


def test_without_a_change_nothing_runs(x):
    model = quantised(Branches())
    with counted(model) as calls, replaying(model) as tape:
        first = tape.record(lambda: model(x))
        calls.clear()
        assert torch.equal(tape.replay(lambda: model(x), []), first)
        ran = {name for name in calls if not name.endswith("quantizer")}
        assert ran == {"", "end", "end.0", "end.1"}  # the sum before `end` is new: no module made it


def test_other_input_is_computed(x):
    model = quantised(Branches())
    other = torch.randn_like(x)
    with replaying(model) as tape:
        tape.record(lambda: model(x))
        got = tape.replay(lambda: model(other), [])
    with torch.no_grad():
        assert torch.equal(got, model(other))


def test_memory_that_was_freed_is_not_taken_for_what_it_held(x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = block(), block()
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * self.factor)  # the product lives in memory that the next one may get

    model = quantised(Scaled())
    with replaying(model) as tape, torch.no_grad():
        tape.record(lambda: model(x[0]))
        for factor in range(2, 10):
            model.factor = float(factor)
            got = tape.replay(lambda: model(x[0]), [])
            assert torch.equal(got, model.second(model.first(x[0]) * factor))


class Careless(nn.Module):
    """Writes into what its modules return."""

    def __init__(self):
        super().__init__()
        self.conv, self.end, self.pair = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), Pair()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += 1
        both = self.pair(y)
        both["sum"] = both["sum"] + both["y"]
        return self.end(both["sum"])


class Pair(nn.Module):
    def forward(self, y: Tensor) -> dict[str, Tensor]:
        return {"y": y, "sum": y * 2}


def test_outputs_that_are_written_into_are_not_handed_out_changed(x):
    model = quantised(Careless())
    with torch.no_grad():
        wanted = model(x[0])
    with replaying(model) as tape:
        assert torch.equal(tape.record(lambda: model(x[0])), wanted)
        for _ in range(2):
            assert torch.equal(tape.replay(lambda: model(x[0]), ["end"]), wanted)


def test_a_module_at_two_places_runs_at_both(x):
    shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    model = quantised(nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.ReLU())))
    module = shared[0]
    with replaying(model) as tape:
        tape.record(lambda: model(x[0]))
        with changed(module):
            got = tape.replay(lambda: model(x[0]), ["0.0.0"])
    with changed(module), torch.no_grad():
        assert torch.equal(got, model(x[0]))


def test_watched_outputs(x):
    model = quantised(Branches())
    with replaying(model, ["left.layer2", "end"]) as tape:
        first = tape.record(lambda: model(x))
        assert list(tape.outputs) == ["left.layer2", "end"]
        assert tape.outputs["end"] is first
        tape.replay(lambda: model(x), ["left.layer10.0"])
        assert list(tape.outputs) == ["end"]
    with (
        pytest.raises(QuantizationError, match=r"output 'left\.layer3' matched no module"),
        replaying(model, ["left.layer3"]),
    ):
        pass


def test_a_weight_is_quantised_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 1)).eval()
    replace_to_quantization_module(model)
    conv, calls = model[0], Counter()
    assert isinstance(conv, QuantConv2d)
    conv._weight_quantizer.set_amax(torch.ones(4, 1, 1, 1))
    conv._input_quantizer.set_amax(torch.tensor(1.0))
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        wanted = model(x)
    conv._weight_quantizer.register_forward_hook(lambda *_: calls.update(["weight"]))
    with replaying(model) as tape:
        for _ in range(3):
            assert torch.equal(tape.record(lambda: model(x)), wanted)
        assert calls["weight"] == 1
        with disable_quantization(conv):
            assert not torch.equal(model(x), wanted)
        assert torch.equal(model(x), wanted)


def state(model: nn.Module) -> tuple:
    """Everything that could be changed by mistake: modules by name in order, their flags and hooks, the state dict."""
    flags = ("training", "inplace", "_disabled", "_if_calib", "_if_quant")
    return (
        list(model.named_modules(remove_duplicate=False)),
        [[getattr(m, flag, None) for flag in flags] + [len(m._forward_hooks)] for m in model.modules()],
        [(name, value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()],
    )


def test_the_model_is_as_before(x):
    model = quantised(Branches())
    model.left["layer2"].train()
    before = state(model)
    with replaying(model, ["end"]) as tape:
        tape.record(lambda: model(x))
        assert not model.left["layer2"].training
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(RuntimeError), replaying(model) as tape:
        tape.record(lambda: model(x[..., 0]))
    assert state(model) == before
    assert not any(isinstance(module, HeldWeight) for module in model.modules())


def test_identity_is_of_values_in_one_place():
    a = torch.zeros(2, 3)
    assert identity((a, [1, {"b": None}])) == identity((a.view(2, 3), [1, {"b": None}]))
    assert identity(a) != identity(a.clone())
    assert identity(a) != identity(a.T)
    assert identity((a, 1)) != identity((a, True))
    assert identity((a, 1)) != identity((a, 2))
    key = identity(a)
    a.add_(1)
    assert identity(a) != key
    assert identity((a, object())) is None


def test_copies_keep_tensors_and_kinds():
    a = torch.zeros(2)
    value = {"list": [a, (a, 1)], "size": a.shape}
    found = copied(value)
    assert found == value
    assert found["list"] is not value["list"]
    assert found["list"][0] is a
    assert isinstance(found["size"], torch.Size)
