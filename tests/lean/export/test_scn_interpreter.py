"""The LiDAR branch's file, executed, against the PyTorch backbone that it was written from."""

import copy

import numpy as np
import onnx
import pytest
import torch

from bevfusion.ops.voxelize import Voxelization
from lean.errors import QuantizationError
from lean.export.rounding import round_to_file
from lean.export.scn_arithmetic import convolve_int8, quantise
from lean.export.scn_interpreter import SparseInterpreter
from lean.export.scn_rulebook import build_rulebook
from lean.export.sparse import export_lidar
from lean.layers import QuantAdd, QuantSparseConvolution
from lean.switches import disable_layers, disable_quantization
from tests.golden_model import golden_batch, golden_config
from tests.lean.export.sparse_samples import (
    ONE_VOXEL,
    cosine,
    distance,
    exact,
    float_backbone,
    golden_backbone,
    small_backbone,
    voxels,
)

PLAIN = {
    "block_type": "conv_module",
    "encoder_channels": ((4,), (8, 8), (12, 12)),
    "encoder_paddings": ((1,), (1, 1), (1, 1)),
}


@pytest.fixture(scope="module")
def original():
    return small_backbone()


@pytest.fixture
def backbone(original):
    return copy.deepcopy(original)


@pytest.fixture
def export(tmp_path):
    """Export a backbone and open the file."""

    def export(backbone, fp16=False, inverse=False, inputs=ONE_VOXEL):
        export_lidar(backbone, tmp_path / "a.onnx", voxels=inputs, fp16=fp16, inverse=inverse)
        return SparseInterpreter(tmp_path / "a.onnx")

    return export


def run(interpreter, features, coordinates, integer: bool, inverse: bool = False) -> np.ndarray:
    order = [0, 3, 2, 1] if inverse else [0, 1, 2, 3]
    return interpreter.run(features.numpy(), coordinates.numpy()[:, order], integer=integer)


def bev(backbone, features, coordinates) -> torch.Tensor:
    with torch.no_grad():
        return backbone(features, coordinates, 1)


@pytest.mark.parametrize("inverse", [False, True], ids=["xyz", "zyx"])
@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["residual", "plain"])
def test_float_equals_pytorch(export, changes, inverse):
    backbone = small_backbone(**changes)
    actual = run(export(backbone, inverse=inverse), *voxels(), False, inverse)
    with disable_quantization(backbone):
        expected = bev(backbone, *voxels())
        rounded = bev(round_to_file(backbone), voxels()[0], voxels()[1])
    assert actual.shape == expected.shape
    assert distance(actual, expected) < 1e-3
    assert distance(actual, rounded) < 1e-5


def test_a_float_backbone_exported_as_fp16_equals_pytorch(export):
    """Its batch normalisations are folded on the way."""
    expected = bev(float_backbone(), *voxels())
    assert distance(run(export(float_backbone(), fp16=True), *voxels(), False), expected) < 1e-3
    assert distance(run(export(float_backbone(), fp16=True), *voxels(), True), expected) < 2e-3


@pytest.mark.parametrize("inverse", [False, True], ids=["xyz", "zyx"])
def test_integers_equal_fake_quantisation_with_the_numbers_of_the_file(export, backbone, inverse):
    """All that the PyTorch model lacks is the fp16 of the output."""
    actual = run(export(backbone, inverse=inverse), *voxels(), True, inverse)
    features, coordinates = voxels()
    expected = bev(exact(backbone), features.half().float(), coordinates)
    assert actual.dtype == np.float16
    assert cosine(actual, expected) >= 0.999
    assert distance(actual, expected) < 5e-4


def round_output(module, inputs, output):
    """Forward hook: the output as fp16 stores it."""
    if isinstance(module, QuantSparseConvolution):
        return output.replace_feature(output.features.half().float())
    return output.half().float()


def test_layers_in_fp16_between_integers(export, backbone):
    disable_layers(backbone, ["encoder_layers.encoder_layer2.0.conv2", "encoder_layers.encoder_layer3.1.add"])
    interpreter = export(backbone)
    backbone, (features, coordinates) = round_to_file(backbone), voxels()
    for name in ("encoder_layer2.0.conv1", "encoder_layer3.0.add", "encoder_layer3.1.conv2"):
        backbone.encoder_layers.get_submodule(name).register_forward_hook(round_output)
    expected = bev(backbone, features.half().float(), coordinates)
    assert distance(run(interpreter, features, coordinates, True), expected) < 5e-4


class Layers:
    """What each layer of `backbone` gives for what reaches it, by name, with a ReLU where the file's layer has one."""

    def __init__(self, backbone):
        self.outputs = []
        for module in backbone.modules():
            if isinstance(module, QuantSparseConvolution | QuantAdd):
                module.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        sparse = isinstance(module, QuantSparseConvolution)
        features = output.features if sparse else output
        self.outputs.append((features.clone(), output.indices if sparse else None))


def same_integers(interpreter, backbone, features, coordinates) -> tuple[int, int]:
    """Compare every stored int8 value with the fake-quantised model's; return the number, and how many differ."""
    layers = Layers(backbone)
    bev(backbone, features.half().float(), coordinates)
    values = interpreter.run_all(features.numpy(), coordinates.numpy(), integer=True)
    nodes = [node for node in interpreter.graph.nodes if node.op in ("SparseConvolution", "Add")]
    compared = wrong = 0
    for node, (output, indices) in zip(nodes, layers.outputs, strict=True):
        if indices is not None:
            order = np.lexsort(indices.numpy().T[::-1])
        expected = output.relu() if node.attributes.get("activation") == "ReLU" else output
        stored = values[node.output]
        ours = np.lexsort(stored.coordinates.T[::-1])
        for bound, integers in stored.integers.items():
            assert integers.dtype == np.int8
            difference = integers[ours] != quantise(expected.numpy()[order], bound)
            compared, wrong = compared + difference.size, wrong + difference.sum()
    return compared, wrong


def test_every_integer_of_every_layer_is_that_of_fake_quantisation(export, backbone):
    interpreter = export(backbone)
    compared, wrong = same_integers(interpreter, exact(backbone), *voxels())
    assert compared > 1e5
    assert wrong == 0


def test_integer_results_differ_from_float_ones(export, backbone):
    """The integers are there: quantisation is visible."""
    interpreter = export(backbone)
    assert 0.005 < distance(run(interpreter, *voxels(), True), run(interpreter, *voxels(), False)) < 0.5


def test_int8_sums_are_exact():
    generator = np.random.default_rng(0)
    features, weight = generator.integers(-128, 128, (50, 1500)), generator.integers(-128, 128, (4, 3, 3, 3, 1500))
    features[0], weight[0, 1, 1, 1] = -128, -128  # 1500 * 2^14 is beyond 2^24
    places = generator.choice(6**3, 50, replace=False)
    coordinates = np.stack([np.zeros(50, int), *np.unravel_index(places, (6, 6, 6))], 1)
    rules = build_rulebook(coordinates, (6,) * 3, (6,) * 3, (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, subm=True)
    actual = convolve_int8(features.astype(np.int8), weight.astype(np.int8), rules)
    expected = np.zeros_like(actual, np.int64)
    for matrix, (source, target) in zip(weight.reshape(4, 27, 1500).transpose(1, 2, 0), rules.pairs, strict=True):
        np.add.at(expected, target, features[source] @ matrix)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)


def test_rounding_is_half_to_even_and_the_range_is_full():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 300, -300, -127.6])
    np.testing.assert_array_equal(quantise(values, 127.0), [0, 2, 2, 0, -2, 126, 127, -128, -128])


@pytest.mark.parametrize("integer", [False, True])
def test_no_voxels_give_an_empty_map(export, backbone, integer):
    features, coordinates = voxels()
    actual = run(export(backbone), features[:0], coordinates[:0], integer)
    assert actual.shape == tuple(bev(backbone, features, coordinates).shape)
    assert not actual.any()


def test_the_order_of_the_voxels_is_of_no_account(export, backbone):
    interpreter, (features, coordinates) = export(backbone), voxels()
    order = torch.randperm(len(features))
    first, second = (run(interpreter, features[rows], coordinates[rows], True) for rows in (slice(None), order))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, c: (f[:5], c), "fit together"),
        (lambda f, c: (f, c + torch.tensor([1, 0, 0, 0])), "one frame"),
        (lambda f, c: (f, c + torch.tensor([0, 40, 0, 0])), "outside the grid of 40 x 32 x 41"),
        (lambda f, c: (f, c * 0), "same coordinates"),
        (lambda f, c: (f * 1e6, c), "overflows fp16"),
    ],
)
def test_voxels_that_do_not_fit(export, backbone, change, words):
    with pytest.raises(QuantizationError, match=words):
        run(export(backbone), *change(*voxels()), True)


def edit(path, change) -> SparseInterpreter:
    """Change the file's graph and open it again."""
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return SparseInterpreter(path)


def set_attribute(graph, node: int, **values) -> None:
    chosen = graph.node[node]
    kept = [a for a in chosen.attribute if a.name not in values]
    del chosen.attribute[:]
    chosen.attribute.extend([*kept, *(onnx.helper.make_attribute(*item) for item in values.items())])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda graph: setattr(graph.node[3], "op_type", "Mul"), "add0 is a Mul"),
        (lambda graph: set_attribute(graph, 10, rulebook="subm1"), "rulebook 'subm1' was built for other voxels"),
        (lambda graph: set_attribute(graph, 2, precision="fp16"), "conv2 reads fp16"),
        (lambda graph: set_attribute(graph, 2, out_channels=5), "conv2: weight"),
        (lambda graph: graph.node[2].attribute.pop(), "no attribute"),
    ],
)
def test_files_that_are_wrong(export, backbone, tmp_path, change, words):
    export(backbone)
    with pytest.raises(QuantizationError, match=words):
        run(edit(tmp_path / "a.onnx", change), *voxels(), True)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(QuantizationError, match="No such file"):
        SparseInterpreter(tmp_path / "none.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(QuantizationError, match="no ONNX file"):
        SparseInterpreter(tmp_path / "a.onnx")


@pytest.mark.slow
def test_golden_frame(golden, export):
    """The full backbone with the reference's weights and ranges, on the voxels of the real frame."""
    backbone = golden_backbone(golden)
    voxelize = Voxelization(**golden_config(golden)["model"]["encoders"]["lidar"]["voxelize"]).eval()
    features, coordinates = voxelize(golden_batch(golden)["points"])
    interpreter = export(backbone)
    with disable_quantization(backbone):
        assert distance(run(interpreter, features, coordinates, False), bev(backbone, features, coordinates)) < 1e-3
    backbone = exact(backbone)
    expected = bev(backbone, features.half().float(), coordinates)
    assert cosine(run(interpreter, features, coordinates, True), expected) >= 0.999
    compared, wrong = same_integers(interpreter, backbone, features, coordinates)
    assert compared > 1e7
    assert wrong == 0
