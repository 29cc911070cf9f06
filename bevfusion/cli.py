"""The boundary between commands and their users."""

import sys
from collections.abc import Callable

import torch

from bevfusion.errors import InputError


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0, or 2 after one line on stderr if its input can't be used. A bug keeps its traceback."""
    try:
        command()
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except torch.OutOfMemoryError as error:
        message = f"{error} Try a smaller data.samples_per_gpu."
    else:
        return 0
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
