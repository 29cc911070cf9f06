"""`qat/engines.py` with a stand-in for trtexec that records how it was called."""

import json
import stat
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from lean.errors import QuantizationError
from lean.export.trtexec import Network, layer_precisions, trtexec_version
from tests.qat.ptq_samples import expect_refusal
from tests.qat.scripts import run_script

STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1:] == ["--help"]:
    print("&&&& RUNNING TensorRT.trtexec [TensorRT v{banner}] # trtexec --help")
    sys.exit(0)
options = dict(part.lstrip("-").partition("=")[::2] for part in sys.argv[1:])
with open(pathlib.Path(sys.argv[0]).with_name("calls"), "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if "{broken}" and options["onnx"].endswith("{broken}"):
    print("[11/23/2026-10:00:00] [E] Error[9]: no kernel for it")
    sys.exit(1)
print("building")
pathlib.Path(options["saveEngine"]).write_text("engine")
tensor = {{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}}
half = {{"Name": "y", "Format": "Row major linear", "DataType": "Half"}}
layers = [{{"Name": "a", "Inputs": [tensor], "Outputs": [half]}}, {{"Name": "b", "Inputs": [half]}}, "c"]
pathlib.Path(options["exportLayerInfo"]).write_text(json.dumps({{"Layers": layers}}))
"""


def stand_in(folder: Path, banner: str = "100300", broken: str = "") -> Path:
    path = folder / "trtexec"
    path.write_text(STAND_IN.format(python=sys.executable, banner=banner, broken=broken))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(trtexec: Path) -> list[list[str]]:
    file = trtexec.with_name("calls")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_network(path: Path, elem_type: int, quantised: bool, plugin: bool = False) -> None:
    scale = helper.make_tensor("s", elem_type, [], [1.0])
    zero = helper.make_tensor("z", TensorProto.INT8, [], [0])
    nodes = [helper.make_node("Relu", ["x"], ["r"], "relu")]
    if quantised:
        nodes += [helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"], "quantize")]
        nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r2"], "dequantize")]
    last = nodes[-1].output[0]
    kind = {"op_type": "CustomLayerNormalization", "domain": "nv"} if plugin else {"op_type": "Relu"}
    nodes.append(helper.make_node(kind.pop("op_type"), [last], ["y"], "last", **kind))
    inputs, outputs = ([helper.make_tensor_value_info(name, elem_type, [1, 4])] for name in "xy")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [scale, zero])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("nv", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)


def export(folder: Path, typing: str, plugin: bool = False) -> Path:
    """A folder of four small files as an export would leave it."""
    folder.mkdir()
    elem_type = {"strong": TensorProto.FLOAT16, "weak": TensorProto.FLOAT}[typing]
    for name in ("camera.backbone", "camera.vtransform", "fuser", "head.bbox"):
        quantised = name in ("camera.backbone", "fuser")
        write_network(folder / f"{name}.onnx", elem_type, quantised, plugin and name == "head.bbox")
    return folder


def precision_options(call: list[str]) -> set[str]:
    return {"--int8", "--fp16", "--stronglyTyped", "--best"} & set(call)


@pytest.mark.parametrize(
    ("typing", "version", "quantised", "others"),
    [
        ("weak", 8, {"--int8", "--fp16"}, {"--fp16"}),
        ("weak", 10, {"--int8", "--fp16"}, {"--fp16"}),
        ("strong", 10, {"--stronglyTyped"}, {"--stronglyTyped"}),
        ("strong", 11, set(), set()),
    ],
)
def test_each_version_gets_the_options_it_knows(tmp_path, typing, version, quantised, others):
    trtexec, files = stand_in(tmp_path), export(tmp_path / "onnx", typing)
    done = run_script("engines.py", "--onnx", files, "--trtexec", trtexec, "--trt", version)
    assert done.status == 0, done.err
    assert [precision_options(call) for call in calls(trtexec)] == [quantised, others, quantised, others]
    for call in calls(trtexec):
        assert "--inputIOFormats=fp16:chw" in call
        assert "--outputIOFormats=fp16:chw" in call
        assert ("--buildOnly" if version == 8 else "--skipInference") in call
    assert sorted(path.name for path in (files / "build").glob("*.plan")) == [
        *("camera.backbone.plan", "camera.vtransform.plan", "fuser.plan", "head.bbox.plan")
    ]
    assert (files / "build/fuser.log").read_text() == "building\n"
    assert "1 INT8, 1 FP16, 1 unknown" in done.out


@pytest.mark.parametrize(
    ("banner", "major"), [("8502", 8), ("8601", 8), ("100300", 10), ("101401", 10), ("110000", 11)]
)
def test_the_version_is_read_from_the_banner(tmp_path, banner, major):
    assert trtexec_version(stand_in(tmp_path, banner)) == major


def test_a_version_that_is_not_known_or_not_said(tmp_path):
    files = export(tmp_path / "onnx", "strong")
    done = run_script("engines.py", "--onnx", files, "--trtexec", stand_in(tmp_path, "90300"))
    expect_refusal(done, "TensorRT 9 is not known")
    with pytest.raises(QuantizationError, match="give it with --trt"):
        trtexec_version(Path("/bin/true"))


def test_the_form_must_fit_the_version(tmp_path):
    trtexec = stand_in(tmp_path)
    for typing, version, wanted in (("strong", 8, "weak"), ("weak", 11, "strong")):
        files = export(tmp_path / typing, typing)
        done = run_script("engines.py", "--onnx", files, "--trtexec", trtexec, "--trt", version)
        expect_refusal(done, f"--typing {wanted}", f"TensorRT {version}")
    assert calls(trtexec) == []


def test_what_is_up_to_date_is_not_built_again(tmp_path):
    trtexec, files = stand_in(tmp_path), export(tmp_path / "onnx", "strong")
    arguments = ("--onnx", files, "--trtexec", trtexec)
    assert run_script("engines.py", *arguments).status == 0
    assert len(calls(trtexec)) == 4
    assert run_script("engines.py", *arguments).out.count("up to date") == 4
    assert len(calls(trtexec)) == 4
    write_network(files / "fuser.onnx", TensorProto.FLOAT16, quantised=False)
    assert run_script("engines.py", *arguments).out.count("up to date") == 3
    assert run_script("engines.py", *arguments, "--trt", 11).out.count("built") == 4


def test_a_failing_build_is_one_line_and_leaves_no_engine(tmp_path):
    trtexec, files = stand_in(tmp_path, broken="fuser.onnx"), export(tmp_path / "onnx", "strong")
    done = run_script("engines.py", "--onnx", files, "--trtexec", trtexec)
    expect_refusal(done, "fuser.plan", "no kernel for it", "fuser.log")
    assert not (files / "build/fuser.plan").exists()
    assert "no kernel" in (files / "build/fuser.log").read_text()
    assert (files / "build/camera.backbone.plan").exists()


def test_a_dry_run_prints_and_runs_nothing(tmp_path):
    trtexec, files = stand_in(tmp_path), export(tmp_path / "onnx", "strong")
    done = run_script("engines.py", "--onnx", files, "--trtexec", trtexec, "--dry-run")
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 4
    assert done.out.startswith(f"{trtexec} --onnx={files}/camera.backbone.onnx")
    assert calls(trtexec) == []
    assert not (files / "build").exists()
    done = run_script("engines.py", "--onnx", files, "--trtexec", "no-such-trtexec", "--trt", 11, "--dry-run")
    assert done.status == 0, done.err


def test_plugins_need_their_library(tmp_path):
    trtexec, files = stand_in(tmp_path), export(tmp_path / "onnx", "strong", plugin=True)
    arguments = ("--onnx", files, "--trtexec", trtexec, "--dry-run")
    expect_refusal(run_script("engines.py", *arguments), "nv::CustomLayerNormalization", "--plugin")
    done = run_script("engines.py", *arguments, "--plugin", "libcustom.so")
    assert ["--staticPlugins=libcustom.so" in line for line in done.out.splitlines()] == [False, False, False, True]


def test_what_is_missing_is_one_clear_line(tmp_path):
    files = export(tmp_path / "onnx", "strong")
    done = run_script("engines.py", "--onnx", files, "--trtexec", tmp_path / "missing")
    expect_refusal(done, str(tmp_path / "missing"), "no such program")
    done = run_script("engines.py", "--onnx", tmp_path, "--trtexec", stand_in(tmp_path))
    expect_refusal(done, "camera.backbone.onnx", "no such file", "qat/export.py")
    (files / "fuser.onnx").write_bytes(b"\x08\xff")
    with pytest.raises(QuantizationError, match="no ONNX file"):
        Network.read(files / "fuser.onnx")


def test_layer_information_that_is_missing_or_damaged_counts_nothing(tmp_path):
    assert not layer_precisions(tmp_path / "a.plan")
    (tmp_path / "a.layers.json").write_text("{")
    assert not layer_precisions(tmp_path / "a.plan")
