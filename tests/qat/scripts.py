"""Running a script of `qat/` in this process, which spares its imports."""

import contextlib
import importlib.util
import io
import sys
from unittest import mock

import pytest

from qat import common
from tests.conftest import ROOT
from tests.qat.ptq_samples import Outcome


def run_script(script: str, *arguments: object) -> Outcome:
    """Run `qat/SCRIPT` with these arguments."""
    specification = importlib.util.spec_from_file_location("script", ROOT / "qat" / script)
    module = importlib.util.module_from_spec(specification)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        specification.loader.exec_module(module)
        common.run(module.main)
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())
