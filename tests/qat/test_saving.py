"""What `qat/ptq.py` leaves on the disk: both files or none, proven to be the model in memory, the same every time."""

import argparse
import hashlib
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import lean
from lean.artifact import Artifact
from lean.errors import QuantizationError
from lean.lock import sole_writer
from qat import calibration, exporting, saving, verification
from qat.arguments import DEFAULT_CONFIG
from qat.common import VerificationError
from qat.fresh_process import verifier
from qat.inference import holds_whole_model, load_model
from qat.made_up import made_up_batch
from tests.conftest import ROOT
from tests.qat.ptq_samples import Outcome, link_frame, options, run_here, with_reduced_model

CPU = torch.device("cpu")
OLD = b"an older result"


@pytest.fixture(scope="module")
def root(tmp_path_factory, realframe, golden) -> Path:
    """A data root of two copies of the real keyframe, with the reduced model's checkpoint."""
    folder = link_frame(tmp_path_factory.mktemp("data") / "nuscenes", realframe, golden, frames=2)
    return with_reduced_model(folder)


def ptq(root: Path, save: Path, *more: object) -> Outcome:
    common = ["--ckpt", root / "float.pth", "--dataset-root", root, "--device", "cpu", "--workers", 0]
    common += ["--calib-pipeline", "test", "--calibrate_batch", 1, "--save", save]
    return run_here("--config", ROOT / DEFAULT_CONFIG, *common, "--cfg-options", *options(root), *more)


@pytest.fixture(scope="module")
def result(root, tmp_path_factory) -> Path:
    """The pickle of a run; the other file is beside it."""
    save = tmp_path_factory.mktemp("result") / "ptq.pth"
    done = ptq(root, save, "--disable", "fuser.0")
    assert done.status == 0, done.err
    assert f"wrote {save.with_suffix('.safetensors')}" in done.out
    return save


@pytest.fixture
def older(tmp_path) -> Path:
    """Where an older result lies, of two files."""
    for path in saving.outputs(tmp_path / "ptq.pth"):
        path.write_bytes(OLD)
    return tmp_path / "ptq.pth"


def assert_nothing_changed(save: Path) -> None:
    """The older result is as it was, and nothing lies beside it."""
    assert {path.name: path.read_bytes() for path in save.parent.iterdir()} == {"ptq.pth": OLD, "ptq.safetensors": OLD}


def expect_refusal(done: Outcome, status: int, *words: str) -> None:
    assert done.status == status, done.out + done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    assert all(word in lines[0] for word in words), lines[0]


def test_both_files_hold_one_model(result):
    pickled, rebuilt = (load_model({}, path, CPU) for path in saving.outputs(result))
    assert verification.first_difference(verification.report(pickled, None), verification.report(rebuilt, None)) is None
    assert rebuilt.ptq == lean.load(result.with_suffix(".safetensors")).ptq
    assert rebuilt.fuser[0].is_disabled
    calibrated = rebuilt.ptq["calibration"]
    assert calibrated["sha256"] == hashlib.sha256("\n".join(calibrated["tokens"]).encode()).hexdigest()


def test_export_takes_either_file(result):
    for path in saving.outputs(result):
        assert holds_whole_model(path)
    args = [argparse.Namespace(ckpt=path, fp16=False, config=None, cfg_options=[]) for path in saving.outputs(result)]
    first, second = (verification.report(exporting.load_for_export(one), None) for one in args)
    assert verification.first_difference(first, second) is None


def test_the_same_run_gives_the_same_bytes_even_if_its_checkpoint_is_replaced_meanwhile(root, result, tmp_path):
    checkpoint = tmp_path / "float.pth"
    checkpoint.write_bytes((root / "float.pth").read_bytes())
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    real = calibration.calibrate

    def replace_and_calibrate(*arguments):
        checkpoint.write_bytes(b"another training run has written this")
        return real(*arguments)

    with mock.patch.object(calibration, "calibrate", replace_and_calibrate):
        done = ptq(root, tmp_path / "ptq.pth", "--disable", "fuser.0", "--ckpt", checkpoint)
    assert done.status == 0, done.err
    assert f"WARNING: {checkpoint} has changed since it was loaded" in done.err
    again, first = (Artifact.read(folder / "ptq.safetensors") for folder in (tmp_path, result.parent))
    assert again.made_of["checkpoint"] == {"file": str(checkpoint), "sha256": before}
    again.made_of["checkpoint"]["file"] = first.made_of["checkpoint"]["file"]
    assert again.to_bytes() == result.with_suffix(".safetensors").read_bytes()


def test_a_file_that_is_not_the_model_in_memory_takes_no_older_ones_place(result, older):
    """As if the file had lost a fold: it is whole, but computes something else."""
    model = load_model({}, result.with_suffix(".safetensors"), CPU)
    with torch.no_grad():
        model.decoder["neck"].deblocks[1][0].weight[0] *= 1.01
    words = "ptq.safetensors, loaded in a fresh process, .*: 1 of 5.. tensors differ, first decoder.neck.deblocks.1.0.w"
    with (
        pytest.raises(VerificationError, match=words),
        verifier() as fresh,
        saving.staged(older) as staging,
    ):
        fresh.start()
        file = Path(shutil.copy(result.with_suffix(".safetensors"), staging))
        verification.verify(model, [file], None, fresh)
    assert_nothing_changed(older)


def test_the_outputs_of_layers_are_compared(result):
    """What differs in no tensor shows in the outputs, from the first layer on that computes something else."""
    model = load_model({}, result.with_suffix(".safetensors"), CPU)
    batch = made_up_batch(model)
    before = {**verification.report(model, None), "outputs": verification.outputs(model, batch)}
    model.fuser[1].register_forward_hook(lambda module, inputs, output: output * 2)
    after = {**verification.report(model, None), "outputs": verification.outputs(model, batch)}
    assert verification.first_difference(before, before) is None
    assert "outputs differ, first decoder.backbone.blocks.0.0" in verification.first_difference(before, after)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["ptq.pth", "ptq.safetensors"])
def test_a_full_disk_is_named_and_the_older_result_kept(result, older, name):
    model = load_model({}, result, CPU)
    save = older.with_name(name)
    with (
        file_size_limit(2**20),
        pytest.raises(QuantizationError, match=rf"{name} was not written: the file would exceed the size limit"),
        saving.staged(save) as staging,
    ):
        saving.write(model, save, staging, model.ptq)
    assert_nothing_changed(older)


def test_two_runs_of_one_result_are_one_too_many(root, older):
    with sole_writer(older.with_suffix(".safetensors")):
        done = ptq(root, older)
    expect_refusal(done, 2, "another run is writing", "ptq.safetensors")
    assert_nothing_changed(older)


def test_a_quantised_model_is_not_quantised_again(root, result, older):
    done = ptq(root, older, "--ckpt", result.with_suffix(".safetensors"))
    expect_refusal(done, 2, "ptq.safetensors: is quantised already; name the float checkpoint")
    assert_nothing_changed(older)


def test_what_a_killed_run_has_left_is_cleared_away(result, older):
    (older.parent / ".ptq.pth.new").mkdir()
    (older.parent / ".ptq.pth.new" / "ptq.pth").write_bytes(b"half")
    with saving.staged(older) as staging:
        assert list(staging.iterdir()) == []
    assert_nothing_changed(older)


def test_the_safe_file_alone_is_written_when_it_is_what_is_asked_for():
    assert saving.outputs(Path("a/b.pth")) == [Path("a/b.pth"), Path("a/b.safetensors")]
    assert saving.outputs(Path("a/b.v2")) == [Path("a/b.v2"), Path("a/b.v2.safetensors")]
    assert saving.outputs(Path("a/b.safetensors")) == [Path("a/b.safetensors")]


@pytest.mark.gpu
def test_a_model_on_the_cpu_is_saved_from_there_where_there_is_a_gpu(tmp_path):
    wrapped = saving.in_parallel(torch.nn.Linear(2, 2))
    torch.save(wrapped, tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    assert loaded.module.weight.device == CPU
    torch.testing.assert_close(loaded.module.weight, wrapped.module.weight, rtol=0, atol=0)
