"""The boundary between commands and their users."""

import errno
import sys
from collections.abc import Callable

from bevfusion.errors import InputError


def exit_code(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a command: 0, 2 after one line on stderr if its input can't be used, 130 after `interrupted` on Ctrl-C.

    A bug keeps its traceback.
    """
    try:
        command()
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{error.strerror}; free some space and run again"
        else:
            raise
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # not imported for the question: the synthetic world does without
        full = torch is not None and isinstance(error, torch.OutOfMemoryError)
        if not full and "CUDA error: out of memory" not in str(error):
            raise
        message = f"{error} Try a smaller data.samples_per_gpu."
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    else:
        return 0
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
