"""A second Python process that gets ready while this one is at work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from qat.common import VerificationError

ROOT = Path(__file__).resolve().parents[1]
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # it is no part of torchrun's


def verifier() -> FreshProcess:
    """The process that `qat.verification.verify` asks; start it early, since importing everything takes long."""
    return FreshProcess("-W", "ignore", "-m", "qat.verification")


class FreshProcess:
    """Runs Python with these arguments, which imports what it needs and then waits for a line on its standard input.

    It ends at the latest with the `with` block, and with this process, however that ends.
    """

    def __init__(self, *arguments: str):
        self._command = [sys.executable, *arguments]
        self._process: subprocess.Popen | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def start(self) -> None:
        """Let it get ready."""
        self._errors = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - the stack closes it
        environment = {name: value for name, value in os.environ.items() if name not in GROUP}
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )

    def ask(self, line: str) -> None:
        """Send it its line; doesn't wait for what it does."""
        with suppress(BrokenPipeError):  # it has died: `wait` says of what
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has done what it was asked for.

        Raises:
            VerificationError: it failed, with the last line that it said.
        """
        if status := self._process.wait():
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
            reason = last.removeprefix("error: ")
            raise VerificationError(f"a fresh process can't load and run what was saved: {reason}")
