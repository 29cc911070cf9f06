"""The plumbing of the scripts: what a user sees when something is wrong, and what the helpers compute."""

import argparse
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from bevfusion.errors import InputError
from qat import arguments, common, tables

ROOT = Path(__file__).resolve().parents[2]


def script(body: str, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    """Run `body` in a process of its own, with `common` imported and the repository as working folder."""
    code = "from qat import arguments, common\n" + textwrap.dedent(body)
    kwargs = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120} | kwargs
    return subprocess.run([sys.executable, "-c", code, *arguments], **kwargs)


def test_importing_it_loads_nothing_heavy():
    result = script("import sys; print({'torch', 'numpy', 'mmcv', 'bevfusion', 'prettytable'} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise common.UsageError('--save: no')", "error: --save: no"),
        ("from lean.errors import QuantizationError as E; raise E('no\\n  data')", "error: no data"),
        (
            "raise RuntimeError('CUDA error: out of memory\\nmore')",
            "error: the GPU has no memory left: end other programs",
        ),
        ("open('missing/file')", "error: missing/file: No such file or directory"),
        ("open('tests', 'w')", "error: tests: Is a directory"),
        (
            "import errno; raise OSError(errno.ENOSPC, 'No space left on device')",
            "error: No space left on device; free",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(body, line):
    result = script(f"def main():\n    {body}\ncommon.run(main)")
    assert result.returncode == 2
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_result_that_fails_its_verification_is_one_line_and_status_3():
    result = script("def main():\n    raise common.VerificationError('a.pth\\n  differs')\ncommon.run(main)")
    assert (result.returncode, result.stderr) == (3, "error: a.pth differs\n")


def test_an_input_error_from_a_data_loading_process_is_one_line(capsys):
    def main():
        from torch._utils import ExceptionWrapper

        try:
            raise InputError("a.jpg: corrupt; replace it")
        except InputError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(SystemExit) as caught:
        common.run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a.jpg: corrupt; replace it\n"


@pytest.mark.parametrize("error", ["KeyError('a')", "OSError(5, 'Input/output error', 'f')", "ImportError('x')"])
def test_a_bug_keeps_its_traceback(error):
    result = script(f"def main():\n    raise {error}\ncommon.run(main)")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")


def test_interruption_and_a_closed_pipe_end_quietly():
    result = script("def main():\n    raise KeyboardInterrupt\ncommon.run(main)")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    reader, writer = os.pipe()
    os.close(reader)
    result = script(
        "common.run(lambda: print('x' * 10**6))", capture_output=False, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_status_is_what_main_returns():
    assert script("common.run(lambda: 1)").returncode == 1
    assert script("common.run(lambda: None)").returncode == 0


def parser() -> arguments.ArgumentParser:
    made = arguments.ArgumentParser("test")
    arguments.add_model_arguments(made)
    arguments.add_run_arguments(made)
    made.add_argument("--batches", type=arguments.positive, default=300, help="how many")
    return made


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batches", "0"], "argument --batches: expected a whole number of 1 or more, got '0'"),
        (["--workers", "-1"], "argument --workers: expected a whole number of 0 or more, got '-1'"),
        (["--seed", "x"], "argument --seed: expected a whole number of 0 or more, got 'x'"),
        (["--seed", "4294967296"], "argument --seed: expected a whole number of 0 or more, got '4294967296'"),
        (["--conf", "x"], "unrecognized arguments: --conf x"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, line):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {line} (see --help)\n"


def test_help_tells_the_defaults_that_tell_something():
    text = " ".join(parser().format_help().split())
    assert "how many (default: 300)" in text
    assert f"(default: {arguments.DEFAULT_CKPT})" in text
    assert "None" not in text
    assert "[]" not in text


def test_default_config_exists_and_takes_the_options(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    root = str(tmp_path / "some: #root")
    config = common.load_config(
        parser().parse_args(["--dataset-root", root, "--cfg-options", "seed=3", "max_epochs=1"])
    )
    assert config.data.train.dataset.ann_file == root + "/nuscenes_infos_train.pkl"
    assert (config.seed, config.runner.max_epochs) == (3, 1)
    config = common.load_config(parser().parse_args(["--dataset-root", "a/", "--cfg-options", "dataset_root=b/"]))
    assert config.dataset_root == "b/"


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.choose_device("auto") == common.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(common.UsageError, match=r"--device cuda: .* sees no CUDA device"):
        common.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.choose_device("auto") == common.choose_device("cuda") == torch.device("cuda")
    assert common.choose_device("cpu") == torch.device("cpu")


def test_seeding_repeats_all_generators():
    def draw(seed):
        common.make_repeatable(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(5) == draw(5)
    assert all(a != b for a, b in zip(draw(5), draw(6), strict=True))


def test_deterministic_mode_is_entered_only_when_asked_for():
    body = """
    import torch
    common.make_repeatable(0)
    print(torch.are_deterministic_algorithms_enabled())
    torch.backends.cudnn.benchmark = True
    common.make_repeatable(0, deterministic=True)
    print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    """
    assert script(body).stdout == "False\nTrue False\n"


NOISY = """
import logging, warnings
parser = arguments.ArgumentParser("test")
arguments.add_logging_arguments(parser)
common.set_up_logging(parser.parse_args())
import bevfusion.data, pytorch_quantization, spconv.pytorch
from pytorch_quantization.nn import TensorQuantizer
TensorQuantizer().disable_calib()
warnings.warn("a library's announcement")
for name in ("qat.script", "bevfusion.data", "lean.quantize"):
    logger = logging.getLogger(name)
    logger.debug("detail of %s", name)
    logger.info("step of %s", name)
    logger.warning("trouble in %s", name)
"""


def test_terminal_shows_our_warnings_once_and_no_announcements():
    result = script(NOISY)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [
        "WARNING: trouble in qat.script",
        "WARNING: trouble in bevfusion.data",
        "WARNING: trouble in lean.quantize",
    ]


def test_quiet_verbose_and_log_file(tmp_path):
    log = tmp_path / "logs" / "run.log"
    result = script(NOISY, "-q", "--log-file", str(log))
    assert result.stderr == ""
    text = log.read_text()
    for part in ("DEBUG qat.script: detail", "INFO lean.quantize: step", "WARNING bevfusion.data: trouble"):
        assert part in text
    assert "a library's announcement" in text
    verbose = script(NOISY, "-v").stderr
    assert "INFO: step of qat.script" in verbose
    assert "a library's announcement" in verbose
    assert "detail of" not in verbose


def test_an_unwritable_log_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = argparse.Namespace(quiet=False, verbose=0, log_file=str(tmp_path / "file" / "run.log"))
    with pytest.raises(common.UsageError, match=r"--log-file .*run\.log: File exists"):
        common.set_up_logging(arguments)


def test_steps_time_what_ran_and_add_up(monkeypatch):
    now = iter([0.0, 1.5, 10.0, 30.25, 40.0])
    monkeypatch.setattr(tables.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(tables, "_cuda_in_use", lambda: None)
    steps = tables.Steps()
    with steps.step("load"):
        pass
    with steps.step("calibrate"):
        pass
    with pytest.raises(KeyError), steps.step("fails"):
        raise KeyError
    rows = [line.replace("|", " ").split() for line in steps.table().splitlines() if "|" in line]
    assert rows == [["step", "seconds"], ["load", "1.5"], ["calibrate", "20.2"], ["total", "21.8"]]


@pytest.mark.gpu
def test_steps_record_peak_memory():
    steps = tables.Steps()
    with steps.step("allocate"):
        torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    assert steps.rows[0][2] >= 64
    assert "peak GPU MiB" in steps.table()


def test_garbage_is_collected_again_after_imports_that_fail():
    with pytest.raises(ImportError), common.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_the_end_of_a_script_searches_nothing_for_garbage():
    tell = "import atexit, gc\natexit.register(lambda: print(len(gc.get_objects())))\n"
    assert int(script(tell + "common.run(lambda: None)").stdout) < 100
    assert int(script(tell).stdout) > 1000
