"""The LiDAR backbone's ONNX file: what is in it, and what is refused."""

import copy
import hashlib
import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bevfusion.models.sparse_encoder import SparseBasicBlock, SparseEncoder
from lean.errors import QuantizationError
from lean.export.scn_graph import load_graph
from lean.export.sparse import export_lidar
from lean.fold import _pairs_in
from lean.funcs import fuse_relu_only
from lean.switches import disable_layers, named_quantizers
from tests.golden_model import golden_config, golden_tensor
from tests.lean.export.sparse_samples import (
    BACKBONE,
    ONE_VOXEL,
    SMALL,
    float_backbone,
    golden_backbone,
    small_backbone,
    voxels,
)


@pytest.fixture(scope="module")
def original():
    return small_backbone()


@pytest.fixture
def backbone(original):
    return copy.deepcopy(original)


def nodes(file, op: str = "SparseConvolution") -> list:
    return [node for node in load_graph(file).nodes if node.op == op]


@pytest.fixture(scope="module")
def golden_files(golden, tmp_path_factory):
    """Both forms of the full file, with the weights folded in float32 as the reference did it."""
    backbone = golden_backbone(golden)
    config = golden_config(golden)["model"]["encoders"]["lidar"]["backbone"]
    unfolded = SparseEncoder(**{key: value for key, value in config.items() if key != "type"})
    for name, module in unfolded.named_modules():
        for conv, norm in _pairs_in(module):
            if isinstance(getattr(module, norm), nn.BatchNorm1d):
                names = f"{name}.{conv}", f"{name}.{norm}"
                backbone.get_submodule(names[0]).weight.data = fold_as_the_reference(*names, getattr(module, conv))
    folder = tmp_path_factory.mktemp("golden")
    for form in ("xyz", "zyx"):
        export_lidar(backbone, folder / form, voxels=ONE_VOXEL, fp16=False, inverse=form == "zyx")
    return folder


def fold_as_the_reference(conv: str, norm: str, layer: nn.Module) -> torch.Tensor:
    """The folded weight (out, kx, ky, kz, in) in the reference's order of float32 operations."""
    out, *kernel, channels = layer.weight.shape
    weight = torch.from_numpy(golden_tensor(f"{BACKBONE}.{conv}.weight", (*kernel, channels, out)))
    gamma, variance = (
        torch.from_numpy(golden_tensor(f"{BACKBONE}.{norm}.{part}", (out,))) for part in ("weight", "running_var")
    )
    return (weight * (gamma * torch.rsqrt(variance + 1e-3))).permute(4, 0, 1, 2, 3).contiguous()


@pytest.mark.parametrize("form", ["xyz", "zyx"])
def test_golden_file(golden, golden_files, form):
    """Every name, attribute, type and weight of the reference's file."""
    reference = json.loads((golden / "onnx_reference.json").read_text())[f"lidar.backbone.{form}"]
    model = onnx.load(golden_files / form)
    assert [(o.domain, o.version) for o in model.opset_import] == [("ai.onnx", 11)]
    assert model.ir_version == reference["ir_version"]
    assert model.graph.name == reference["graph_name"]
    for ours, theirs in ((model.graph.input, reference["inputs"]), (model.graph.output, reference["outputs"])):
        tensor = ours[0].type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        assert [{"name": ours[0].name, "dtype": "FLOAT16", "shape": shape}] == theirs
        assert tensor.elem_type == onnx.TensorProto.FLOAT16
    for ours, theirs in zip(load_graph(golden_files / form).nodes, reference["nodes"], strict=True):
        assert (ours.name, ours.op, list(ours.inputs), [ours.output]) == (
            *(theirs[key] for key in ("name", "op_type", "inputs", "outputs")),
        )
        assert ours.attributes == theirs["attributes"], ours.name
    for node in model.graph.node:
        types = {a.name: onnx.AttributeProto.AttributeType.Name(a.type) for a in node.attribute}
        assert types == reference["attribute_types"][node.op_type]
    for ours, theirs in zip(model.graph.initializer, reference["initializers"], strict=True):
        assert (ours.name, list(ours.dims), ours.data_type) == (theirs["name"], theirs["shape"], 10)
        assert hashlib.sha256(ours.raw_data).hexdigest() == theirs["sha256"], ours.name


def test_weights_folded_in_float64_differ_from_the_reference_by_one_rounding(golden, golden_files, tmp_path):
    """What a user's file holds."""
    export_lidar(golden_backbone(golden), tmp_path / "a", voxels=ONE_VOXEL, fp16=False)
    ours, theirs = load_graph(tmp_path / "a").weights, load_graph(golden_files / "xyz").weights
    for name, weight in ours.items():
        steps = np.abs(weight.view(np.int16).astype(int) - theirs[name].view(np.int16))
        assert steps.max() <= 1, name
        assert (steps > 0).mean() < 1e-3, name


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_second_export_gives_the_same_bytes_and_leaves_the_backbone_alone(backbone, tmp_path, fp16, inverse):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.train()
    for name in "ab":
        export_lidar(backbone, tmp_path / name, voxels=voxels(), fp16=fp16, inverse=inverse)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in backbone.modules())
    assert any(not quantizer._disabled for quantizer in named_quantizers(backbone).values())


def test_the_file_does_not_depend_on_the_voxels(backbone, tmp_path):
    features, coordinates = voxels()
    kept = features.clone()
    export_lidar(backbone, tmp_path / "a", voxels=(features, coordinates), fp16=False)
    export_lidar(backbone, tmp_path / "b", voxels=ONE_VOXEL, fp16=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(features, kept)


def test_a_backbone_with_fused_relus_gives_the_same_file(backbone, tmp_path):
    export_lidar(backbone, tmp_path / "a", voxels=ONE_VOXEL, fp16=False)
    export_lidar(fuse_relu_only(backbone), tmp_path / "b", voxels=ONE_VOXEL, fp16=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


PLAIN = {
    "block_type": "conv_module",
    "encoder_channels": ((4,), (8, 8), (12, 12)),
    "encoder_paddings": ((1,), (1, 1), (1, 1)),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"sparse_shape": (24, 56, 41)},
        {"in_channels": 4, "base_channels": 6, "encoder_channels": ((6, 6, 8), (8, 8, 12), (12, 12, 16), (16, 16))},
        {"output_channels": 24},
        PLAIN,
    ],
    ids=["grid", "features", "outputs", "plain"],
)
def test_all_shapes_come_from_the_model(tmp_path, changes):
    backbone = small_backbone(**changes)
    grid, channels = changes.get("sparse_shape", SMALL["sparse_shape"]), changes.get("in_channels", 5)
    inputs = voxels(600, channels, grid)
    export_lidar(backbone, tmp_path / "a", voxels=inputs, fp16=False)
    convs = nodes(tmp_path / "a")
    with torch.no_grad():
        bev = backbone(*inputs, 1)
    assert convs[0]["input_spatial_shape"] == list(grid)
    assert convs[0]["in_channels"] == channels
    assert nodes(tmp_path / "a", "Reshape")[0]["dims"] == list(bev.shape)
    for before, after in itertools.pairwise(convs):
        assert after["input_spatial_shape"] == before["output_spatial_shape"]
        assert after["in_channels"] == before["out_channels"]


def test_blocks_of_a_stage_share_a_rulebook_and_strided_layers_have_their_own(backbone, tmp_path):
    export_lidar(backbone, tmp_path / "a", voxels=ONE_VOXEL, fp16=False)
    books = [node["rulebook"] for node in nodes(tmp_path / "a")]
    subm = [node["rulebook"] for node in nodes(tmp_path / "a") if node["subm"]]
    assert subm == ["subm1"] * 5 + ["subm2"] * 4 + ["subm3"] * 4 + ["subm4"] * 4
    assert sorted(set(books) - set(subm)) == ["spconv1", "spconv2", "spconv3", "spconv_down2"]


def test_precision_follows_the_model(backbone, tmp_path):
    layer = "encoder_layers.encoder_layer2.0"
    disable_layers(backbone, [f"{layer}.conv2", "encoder_layers.encoder_layer3.1.add"])
    export_lidar(backbone, tmp_path / "a", voxels=ONE_VOXEL, fp16=False)
    convs, adds = nodes(tmp_path / "a"), nodes(tmp_path / "a", "Add")
    assert [node.name for node in convs if node["precision"] == "fp16"] == ["conv0", "conv7"]
    # What an fp16 layer reads is stored as fp16: conv7's input, both inputs of add5, and the dense map's.
    assert [node.name for node in convs if node["output_precision"] == "fp16"] == ["conv6", "conv14", "conv20"]
    assert [node.name for node in adds if node["precision"] == "fp16"] == ["add5"]
    assert [node.name for node in adds if node["output_precision"] == "fp16"] == ["add4"]


def test_fp16_of_a_quantised_and_of_a_float_backbone_hold_the_same_weights(backbone, tmp_path):
    export_lidar(backbone, tmp_path / "a", voxels=ONE_VOXEL, fp16=True)
    export_lidar(float_backbone(), tmp_path / "b", voxels=ONE_VOXEL, fp16=True)
    quantised, plain = load_graph(tmp_path / "a"), load_graph(tmp_path / "b")
    for name, weight in quantised.weights.items():
        np.testing.assert_array_equal(weight, plain.weights[name])
    for ours, theirs in zip(quantised.nodes, plain.nodes, strict=True):
        kept = {key: value for key, value in ours.attributes.items() if "dynamic_range" not in key}
        assert kept == theirs.attributes
        assert {kept.get("precision", "fp16"), kept.get("output_precision", "fp16")} == {"fp16"}


class EarlyShortcut(SparseBasicBlock):
    """Adds what the first convolution gives before its ReLU."""

    def forward(self, x):
        first = self.conv1(x)
        second = self.conv2(first.replace_feature(self.relu(first.features)))
        return x.replace_feature(self.relu(self.add(second.features, first.features)))


def test_a_relu_whose_input_others_read_stays_a_node(backbone, tmp_path):
    block = backbone.encoder_layers.encoder_layer1[0]
    block.__class__ = EarlyShortcut
    block.relu.inplace = False
    export_lidar(backbone, tmp_path / "a", voxels=ONE_VOXEL, fp16=False)
    conv, relu = nodes(tmp_path / "a")[1], nodes(tmp_path / "a", "Relu")
    assert len(relu) == 9
    assert relu[0].inputs == (conv.output,)
    assert conv["activation"] == "None"


def refuse(backbone, tmp_path, *words: str, voxels=ONE_VOXEL, fp16: bool = False) -> None:
    """Expect one line with all `words`, and that an older file stays."""
    (tmp_path / "a").write_bytes(b"older")
    with pytest.raises(QuantizationError) as caught:
        export_lidar(backbone, tmp_path / "a", voxels=voxels, fp16=fp16)
    for word in words:
        assert word in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_float_backbone_needs_fp16(tmp_path):
    refuse(float_backbone(), tmp_path, "not quantised", "qat/ptq.py", "--fp16")


BLOCK = "encoder_layers.encoder_layer2.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_unusable_amax(backbone, tmp_path, value):
    backbone.get_submodule(f"{BLOCK}.conv1")._input_quantizer.set_amax(torch.tensor(value))
    refuse(backbone, tmp_path, f"{BLOCK}.conv1._input_quantizer")


def test_amax_that_rounds_to_zero_in_fp16(backbone, tmp_path):
    backbone.get_submodule(f"{BLOCK}.add")._input_quantizer.set_amax(torch.tensor(1e-9))
    refuse(backbone, tmp_path, f"{BLOCK}.add._input_quantizer", "1e-09")


def test_no_amax(backbone, tmp_path):
    del backbone.get_submodule(f"{BLOCK}.conv1")._weight_quantizer._amax
    refuse(backbone, tmp_path, f"{BLOCK}.conv1._weight_quantizer", "amax")


@pytest.mark.parametrize(("value", "shown"), [(7e4, "70000"), (float("nan"), "NaN")])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("fp16", [False, True])
def test_values_that_fp16_can_not_hold(backbone, tmp_path, part, value, shown, fp16):
    getattr(backbone.get_submodule(f"{BLOCK}.conv1"), part).data.view(-1)[3] = value
    refuse(backbone, tmp_path, f"{BLOCK}.conv1.{part}", shown, fp16=fp16)


def test_a_layer_quantised_by_half(backbone, tmp_path):
    backbone.get_submodule(f"{BLOCK}.conv1")._weight_quantizer._disabled = True
    refuse(backbone, tmp_path, f"{BLOCK}.conv1", "one is off")


def test_an_add_that_quantises_one_input_alone(backbone, tmp_path):
    backbone.get_submodule(f"{BLOCK}.add").inputs = "second"
    refuse(backbone, tmp_path, f"{BLOCK}.add", "both inputs")


def test_a_norm_without_a_convolution(backbone, tmp_path):
    backbone.conv_input._modules["2"] = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8))
    refuse(backbone, tmp_path, "conv_input.2.1")


def test_a_layer_the_runtime_does_not_have(backbone, tmp_path):
    backbone.conv_input._modules["2"] = nn.GELU()
    refuse(backbone, tmp_path, "encoder_layer1.0.conv1 reads a tensor")


class OtherFlattening(SparseEncoder):
    """Flattens the channels in another order."""

    def forward(self, *args):
        return super().forward(*args).flip(1)


def test_another_way_to_flatten(backbone, tmp_path):
    backbone.__class__ = OtherFlattening
    refuse(backbone, tmp_path, "flatten", voxels=voxels())


def test_a_folder_that_can_not_be_written(backbone, tmp_path):
    with pytest.raises(QuantizationError, match="nowhere"):
        export_lidar(backbone, tmp_path / "nowhere" / "a", voxels=ONE_VOXEL, fp16=False)
