"""The dense files of a small quantised model: run by onnxruntime against the model itself."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pytorch_quantization.nn import TensorQuantizer

from bevfusion.config import load_config
from bevfusion.models import build_model
from lean.errors import QuantizationError
from lean.export.dense import DenseOptions, export_camera, export_transfuser, exportable_quantizers
from lean.export.graph import GraphView
from lean.export.head import BBoxHead
from lean.export.lint import lint, summary
from lean.export.parts import CameraBackbone, camera_inputs, pooled_map, sensor_maps
from lean.switches import disable_quantization, named_quantizers, quantizer_flags
from tests.conftest import ROOT
from tests.lean.export.samples import distance, prepare, reduced_batch, reduced_model, reduced_ptq, run
from tests.qat.ptq_samples import REDUCED

FORMS = [DenseOptions(typing, fp16) for typing in ("weak", "strong") for fp16 in (False, True)]
SWIN = "configs/nuscenes/det/transfusion/secfpn/camera+lidar/swint_v0p075/convfuser.yaml"
FILES = ("camera.backbone", "camera.vtransform", "fuser", "head.bbox")


def name_of(options: DenseOptions) -> str:
    return f"{options.typing}{'-fp16' * options.fp16}{'-plugin' * options.layernorm_plugin}"


@pytest.fixture(scope="module")
def model(golden):
    return reduced_ptq(golden)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Write (once) the files of a form, and return what was written by name."""
    done = {}

    def write(options: DenseOptions) -> SimpleNamespace:
        if options not in done:
            folder = tmp_path_factory.mktemp(name_of(options))
            written = export_camera(model, folder, options) + export_transfuser(model, folder, options)
            done[options] = {part.path.name.removesuffix(".onnx"): part for part in written}
        return done[options]

    return write


@pytest.fixture(scope="module")
def activations(model, golden):
    """The real frame's images, a depth map with as many zeros as a real one, and random maps for the other parts."""
    images = reduced_batch(golden)["img"]
    depth = camera_inputs(model, 6)["depth"]
    depth[torch.rand(depth.shape) < 0.95] = 0
    maps = {name: torch.relu(torch.randn(x.shape)) for name, x in sensor_maps(model).items()}
    cells = model.heads["object"].bev_pos[0, -1].int() + 1
    return {
        "camera.backbone": {"img": images, "depth": depth},
        "camera.vtransform": {"feat_in": torch.randn(pooled_map(model).shape)},
        "fuser": maps,
        "head.bbox": {"middle": torch.relu(torch.randn(1, 512, *cells))},
    }


def expected(model, activations, fp16: bool) -> dict[str, dict[str, torch.Tensor]]:
    """What the model's own modules compute of `activations`, by file and output."""
    prediction, pooled = model.heads["object"], {"input": activations["camera.vtransform"]["feat_in"]}
    with torch.no_grad(), disable_quantization(model) if fp16 else nullcontext():
        features, weights = CameraBackbone(model)(**activations["camera.backbone"])
        maps = activations["fuser"]
        fused = model.decoder["neck"](model.decoder["backbone"](model.fuser([maps["camera"], maps["lidar"]])))
        raw = prediction(activations["head.bbox"]["middle"])
        one_hot = torch.nn.functional.one_hot(raw["query_labels"], prediction.num_classes).transpose(1, 2)
        score = raw["heatmap"].sigmoid() * raw["query_heatmap_score"] * one_hot
        boxes = {"score": score, "reg": raw["center"], **{n: raw[n] for n in ("rot", "dim", "height", "vel")}}
        return {
            "camera.backbone": {"camera_feature": features, "camera_depth_weights": weights},
            "camera.vtransform": {"feat_out": model.encoders["camera"]["vtransform"].downsample(**pooled)},
            "fuser": {"middle": fused[0] if isinstance(fused, (list, tuple)) else fused},
            "head.bbox": boxes,
        }


def test_the_camera_part_computes_what_the_detector_does(model, activations):
    camera, inputs = model.encoders["camera"], activations["camera.backbone"]
    with torch.no_grad():
        finest = camera["neck"](camera["backbone"](inputs["img"].flatten(0, 1)))[0]
        weights, context = camera["vtransform"].lift(finest, inputs["depth"].flatten(0, 1))
        features, depth_weights = CameraBackbone(model)(**inputs)
    torch.testing.assert_close(features, context.permute(0, 2, 3, 1))
    torch.testing.assert_close(depth_weights, weights)


@pytest.mark.parametrize("name", FILES)
def test_float_files_equal_the_model(model, files, activations, name):
    outputs = run(files(DenseOptions("weak", fp16=True))[name].path, **activations[name])
    wanted = expected(model, activations, fp16=True)[name]
    assert list(outputs) == list(wanted) if name != "head.bbox" else set(outputs) == set(wanted)
    for output, value in wanted.items():
        assert distance(outputs[output], value) < 1e-5, output


@pytest.mark.parametrize("name", FILES)
def test_fp16_files_equal_the_model_as_far_as_fp16_goes(model, files, activations, name):
    outputs = run(files(DenseOptions("strong", fp16=True))[name].path, **activations[name])
    wanted = expected(model, activations, fp16=True)[name]
    for output, value in wanted.items():
        assert outputs[output].dtype == np.float16
        assert distance(outputs[output], value) < 3e-3, output


def test_quantised_files_equal_the_model_but_for_flipped_roundings(model, files, activations):
    wanted = expected(model, activations, fp16=False)
    for name in ("camera.backbone", "fuser"):
        for typing, tolerance in (("weak", 0.02), ("strong", 0.05)):
            outputs = run(files(DenseOptions(typing))[name].path, **activations[name])
            for output, value in wanted[name].items():
                assert distance(outputs[output], value) < tolerance, (typing, output)


def layer_tensors(path: Path, prefix: str) -> dict[str, tuple[str, str, str]]:
    """Tensors before the input's Q/DQ pair and after the layer, by the name of the quantised layer."""
    graph = onnx.load(path)
    view = GraphView(graph)
    found = {}
    for node in graph.graph.node:
        sources = [view.source(name) for name in node.input[:2]]
        if node.op_type in ("Conv", "ConvTranspose") and sources[1] is not None:
            data, weight = (view.source(source.input[0]).input[0] for source in sources)
            found[weight.removeprefix(prefix).removesuffix(".weight")] = (data, node.output[0])
    return found


def with_outputs(path: Path, names: list[str]) -> bytes:
    graph = onnx.load(path)
    known = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in known)
    return graph.SerializeToString()


def layers_run_alone(model, path: Path, inputs: dict, prefix: str):
    """Yield (name, the model's layer, what reached it in the file, what it gave there) for the quantised layers."""
    layers = layer_tensors(path, prefix)
    known = {tensor.name for tensor in onnx.load(path).graph.input}
    extra = [tensor for pair in layers.values() for tensor in pair if tensor not in known]
    values = {name: value.numpy() for name, value in inputs.items()}
    values |= run(with_outputs(path, extra), **inputs)
    for name, (before, after) in layers.items():
        yield name, model.get_submodule(name), torch.from_numpy(values[before].astype(np.float32)), values[after]


QUANTISED = [("camera.backbone", "model.", 63), ("fuser", "parent.", 14)]


@pytest.mark.parametrize(("name", "prefix", "count"), QUANTISED)
def test_each_quantised_layer_equals_the_model_s_on_what_reaches_it(model, files, activations, name, prefix, count):
    layers = list(layers_run_alone(model, files(DenseOptions("weak"))[name].path, activations[name], prefix))
    assert len(layers) == count
    clear = places = 0
    for layer_name, layer, before, after in layers:
        with torch.no_grad():
            wanted = layer(before)
        assert distance(after, wanted) < 1e-3, layer_name
        largest = wanted.topk(2, dim=1).values
        step = layer._input_quantizer.amax / 127 * layer.weight.abs().max()  # what one flipped rounding can change
        apart = largest[:, 0] - largest[:, 1] > step
        same = torch.from_numpy(after).argmax(1) == wanted.argmax(1)
        assert same[apart].all(), layer_name
        clear, places = clear + apart.sum(), places + apart.numel()
    assert clear > 0.2 * places


@pytest.mark.parametrize(("name", "prefix", "count"), QUANTISED)
def test_each_layer_in_fp16_equals_the_model_s_with_its_scale_rounded(model, files, activations, name, prefix, count):
    layers = list(layers_run_alone(model, files(DenseOptions("strong"))[name].path, activations[name], prefix))
    assert len(layers) == count
    for layer_name, layer, before, after in layers:
        scale = (layer._input_quantizer.amax / 127).half().double()
        quantised = scale * torch.clamp(torch.round(before.double() / scale), -128, 127)  # FP16 has many exact ties
        with torch.no_grad(), quantizer_flags([layer._input_quantizer], _disabled=True):
            assert distance(after, layer(quantised.float())) < 2e-3, layer_name


def test_inputs_outputs_and_types(model, files):
    shapes = {
        "camera.backbone": {"img": [1, 6, 3, 64, 176], "depth": [1, 6, 1, 64, 176]}
        | {"camera_feature": [6, 8, 22, 80], "camera_depth_weights": [6, 118, 8, 22]},
        "camera.vtransform": {"feat_in": [1, 80, 96, 96], "feat_out": [1, 80, 48, 48]},
        "fuser": {"camera": [1, 80, 48, 48], "lidar": [1, 256, 48, 48], "middle": [1, 512, 48, 48]},
        "head.bbox": {"middle": [1, 512, 48, 48], "score": [1, 10, 20], "rot": [1, 2, 20], "dim": [1, 3, 20]}
        | {"reg": [1, 2, 20], "height": [1, 1, 20], "vel": [1, 2, 20]},
    }
    for options in FORMS:
        for name, written in files(options).items():
            graph = onnx.load(written.path).graph
            tensors = [tensor for group in (graph.input, graph.output) for tensor in group]
            found = {t.name: [d.dim_value for d in t.type.tensor_type.shape.dim] for t in tensors}
            assert found == shapes[name]
            wanted = TensorProto.FLOAT16 if options.typing == "strong" else TensorProto.FLOAT
            assert {t.type.tensor_type.elem_type for t in tensors} == {wanted}
            onnx.checker.check_model(str(written.path), full_check=True)


def test_strong_files_hold_no_float32_but_where_they_say_so(files):
    for name, written in files(DenseOptions("strong")).items():
        graph = onnx.load(written.path).graph
        wide = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
        readers = [n for n in graph.node if wide & set(n.input) and n.op_type != "Resize"]
        assert {node.name for node in readers} <= set(written.half.float32), name
    half = files(DenseOptions("strong"))["head.bbox"].half
    assert {name.rpartition("/")[2].partition("_")[0] for name in half.float32} >= {"Sigmoid", "TopK", "Pad"}


def test_strong_files_hold_the_same_integers_as_weak_ones(files):
    def integers(typing: str, name: str) -> dict[str, np.ndarray]:
        graph = onnx.load(files(DenseOptions(typing))[name].path)
        view, found = GraphView(graph), {}
        for node in graph.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in view.initialisers:
                weight, scale = (view.array(x).astype(np.float32) for x in node.input[:2])
                axis = [-1 if i == 0 else 1 for i in range(weight.ndim)]
                found[node.input[0]] = np.clip(np.rint(weight / scale.reshape(axis)), -128, 127)
        return found

    for name, count in (("camera.backbone", 63), ("fuser", 14)):
        weak, strong = integers("weak", name), integers("strong", name)
        assert len(weak) == count
        for weight, value in weak.items():
            np.testing.assert_array_equal(strong[weight], value, err_msg=weight)


def test_scales_are_the_calibrated_ones(model, files):
    graph = onnx.load(files(DenseOptions("weak"))["fuser"].path)
    view = GraphView(graph)
    scales = [view.array(n.input[1]) for n in graph.graph.node if n.op_type == "QuantizeLinear"]
    layer = model.fuser[0]
    assert any(s.ndim == 0 and s == np.float32(layer._input_quantizer.amax.item() / 127) for s in scales)
    wanted = (layer._weight_quantizer.amax.flatten() / 127).numpy()
    assert any(s.shape == wanted.shape and np.array_equal(s, wanted) for s in scales)


def test_the_lint_names_what_stays_float_and_why(files):
    written = files(DenseOptions("weak"))
    assert {finding.why_float for finding in written["camera.backbone"].findings} == {None}
    (disabled,) = [finding for finding in written["fuser"].findings if finding.why_float]
    assert "deblocks.0.0" in disabled.node
    assert "not quantised" in disabled.why_float
    assert summary("fuser.onnx", written["fuser"].findings)[0] == "fuser.onnx: 14 of 15 in INT8"
    assert len(written["head.bbox"].findings) == 20 + 11
    assert all(finding.why_float for finding in written["head.bbox"].findings)


def test_the_lint_sees_scales_that_tensorrt_would_not_take(files):
    graph = onnx.load(files(DenseOptions("weak"))["camera.backbone"].path)
    view = GraphView(graph)
    conv = next(node for node in graph.graph.node if node.op_type == "Conv")
    attribute = next(a for a in view.source(conv.input[1]).attribute if a.name == "axis")
    attribute.i = 1
    concat = next(n for n in graph.graph.node if n.op_type == "Concat")
    scale = view.initialisers[view.source(concat.input[1]).input[1]]
    pair = view.source(concat.input[1])
    graph.graph.initializer.append(numpy_helper.from_array(2 * numpy_helper.to_array(scale), "other"))
    pair.input[1] = "other"
    found = {finding.node: finding.why_float for finding in lint(graph) if finding.why_float}
    assert found == {
        conv.name: "its weight has scales on axis 1, TensorRT takes axis 0",
        concat.name: "its inputs have different scales",
    }


def test_layer_normalisation_as_the_plugin_s_node(files):
    for typing in ("weak", "strong"):
        plain = onnx.load(files(DenseOptions(typing))["head.bbox"].path)
        graph = onnx.load(files(DenseOptions(typing, layernorm_plugin=True))["head.bbox"].path)
        nodes = [node for node in graph.graph.node if node.domain == "nv"]
        assert [node.op_type for node in nodes] == ["CustomLayerNormalization"] * 3
        for node in nodes:
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert values == {"axis": -1, "epsilon": pytest.approx(1e-5)}
            assert [name.rpartition(".")[2] for name in node.input[1:]] == ["weight", "bias"]
        assert [o.name for o in graph.graph.output] == [o.name for o in plain.graph.output]
        assert {(o.domain, o.version) for o in graph.opset_import} >= {("nv", 1)}
        assert not {"LayerNormalization", "ReduceMean"} & {node.op_type for node in graph.graph.node}


def test_plugin_nodes_replaced_by_standard_ones_give_the_same(files, activations):
    graph = onnx.load(files(DenseOptions("strong", layernorm_plugin=True))["head.bbox"].path)
    for node in graph.graph.node:
        if node.domain == "nv":
            node.domain, node.op_type = "", "LayerNormalization"
    plain = run(files(DenseOptions("strong"))["head.bbox"].path, **activations["head.bbox"])
    for name, value in run(graph.SerializeToString(), **activations["head.bbox"]).items():
        np.testing.assert_array_equal(value, plain[name])


def test_a_second_export_gives_the_same_bytes_and_the_model_stays_as_it_was(model, files, tmp_path):
    options = DenseOptions("strong")
    before = {name: q._disabled for name, q in named_quantizers(model).items()}
    for written in (*export_camera(model, tmp_path, options), *export_transfuser(model, tmp_path, options)):
        first = files(options)[written.path.name.removesuffix(".onnx")].path
        assert written.path.read_bytes() == first.read_bytes()
    export_camera(model, tmp_path, DenseOptions("weak", fp16=True))
    assert before == {name: q._disabled for name, q in named_quantizers(model).items()}
    assert TensorQuantizer.use_fb_fake_quant is False


def test_the_switch_of_all_quantizers_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), exportable_quantizers():
        assert TensorQuantizer.use_fb_fake_quant
        raise ZeroDivisionError
    assert TensorQuantizer.use_fb_fake_quant is False


def test_what_fp16_can_not_hold_is_refused_by_name(golden, tmp_path):
    model = reduced_ptq(golden)
    bias = model.encoders["camera"]["vtransform"].downsample[3].bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[5] = 7e4
    with pytest.raises(QuantizationError, match=r"camera\.vtransform\.onnx: 3\.bias reaches 7e\+04"):
        export_camera(model, tmp_path, DenseOptions("weak"))
    with torch.no_grad():
        bias.copy_(before)
    model.fuser[0]._input_quantizer.set_amax(torch.tensor(1e5))
    with pytest.raises(QuantizationError, match=r"fuser\.onnx: the range of .*Concat.* reaches 1e\+05"):
        export_transfuser(model, tmp_path, DenseOptions("strong"))


def test_models_that_can_not_be_exported(golden, tmp_path):
    float_model = reduced_model()
    options = DenseOptions()
    with pytest.raises(QuantizationError, match=r"not quantised: run qat/ptq\.py"):
        export_camera(float_model, tmp_path, options)
    with pytest.raises(QuantizationError, match="whole model"):
        export_camera(float_model.state_dict(), tmp_path, options)
    model = reduced_ptq(golden)
    with torch.no_grad():
        model.fuser[0]._input_quantizer._amax.fill_(float("nan"))
    with pytest.raises(QuantizationError, match=r"fuser\.0\._input_quantizer"):
        export_transfuser(model, tmp_path, options)
    model.fuser[0]._input_quantizer.set_amax(torch.tensor(1.0))
    with torch.no_grad():
        model.fuser[0].bias[0] = float("inf")
    with pytest.raises(QuantizationError, match=r"fuser\.0\.bias holds NaN or infinity"):
        export_transfuser(model, tmp_path, options)
    model.fuser = None
    with pytest.raises(QuantizationError, match="no 'fuser'"):
        export_transfuser(model, tmp_path, DenseOptions(fp16=True))
    with pytest.raises(QuantizationError, match="typing must be one of"):
        DenseOptions("both")
    assert list(tmp_path.iterdir()) == []


def test_a_head_without_velocities_has_no_such_output():
    model = reduced_model()
    heads = model.heads["object"].prediction_heads[-1]
    heads.names = tuple(name for name in heads.names if name != "vel")
    assert BBoxHead(model).output_names == ["score", "rot", "dim", "reg", "height"]


@pytest.mark.slow
def test_a_camera_with_a_swin_transformer(tmp_path):
    config = load_config(
        ROOT / SWIN, [key for key in REDUCED if ".camera.backbone." not in key and ".neck." not in key]
    )
    torch.manual_seed(0)
    model = prepare(build_model(config.model).eval())
    for quantizer in named_quantizers(model).values():
        if quantizer.axis is None:
            quantizer.set_amax(torch.tensor(4.0))
    (backbone, _) = export_camera(model, tmp_path, DenseOptions("strong"))
    layers = [finding for finding in backbone.findings if finding.kind != "Concat"]
    products = [finding for finding in layers if finding.why_float]
    assert (len(layers), len(products)) == (86, 24)
    assert all("w_msa/MatMul" in finding.node for finding in products)  # attention between activations
    (backbone, _) = export_camera(model, tmp_path, DenseOptions("weak", fp16=True))
    operators = {node.op_type for node in onnx.load(backbone.path).graph.node}
    assert not operators & {"Shape", "Where", "ScatterND", "Cast", "Unsqueeze"}
    inputs = camera_inputs(model, 6)
    with torch.no_grad(), disable_quantization(model):
        wanted = CameraBackbone(model)(**inputs)
    for value, expected_value in zip(run(backbone.path, **inputs).values(), wanted, strict=True):
        assert distance(value, expected_value) < 1e-5
