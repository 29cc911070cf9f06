"""The commands' boundary: the exit status and the one line that a user sees."""

import errno

import pytest
import torch

from bevfusion.cli import exit_code
from bevfusion.errors import InputError


def raising(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a.json: no\n  such key"), 2, "error: a.json: no such key"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2, "error: a: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; free some space"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory. Try a smaller"),
        (RuntimeError("CUDA error: out of memory\nmore"), 2, "error: CUDA error: out of memory more Try a smaller"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, status, line):
    assert exit_code(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a bug"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_code(raising(error))


def test_success_is_0():
    assert exit_code(lambda: None) == 0
