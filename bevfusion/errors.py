"""The one exception that stands for bad input."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """A file, option or config that can't be used: says what, where, and what to do, in one line."""


@contextmanager
def explaining(what: str, advice: str) -> Iterator[None]:
    """Turn whatever values from outside make the code in a `with` block raise into an InputError.

    For code of libraries and constructors that don't check their arguments. It hides a bug as well as a mistake: the
    log, at its finest, keeps where it came from.

    Raises:
        InputError: "`what` (the error's kind and text): `advice`"; one that is raised inside stays as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        logger.debug("%s", what, exc_info=True)
        lines = str(error).strip().splitlines()
        raise InputError(f"{what} ({type(error).__name__}{': ' + lines[0] if lines else ''}): {advice}") from error
