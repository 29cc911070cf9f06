"""Import mmdet3d 1.0.0rc6 beside mmcv-full 1.7.2, quietly.

mmdet3d 1.0.0rc6 asserts ``mmcv.__version__ <= 1.7.0``; 1.7.2 is the first mmcv-full that builds against
torch >= 2.1 and differs from 1.7.0 in build fixes only. The version is understated for the moment of the import.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keep off the terminal what old libraries announce when they are imported: users can do nothing about it."""
    notice = logging.getLogger("torch.utils.cpp_extension")  # "No CUDA runtime is found"
    level = notice.level
    notice.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notice.setLevel(level)


def import_mmdet3d() -> None:
    """Import mmdet3d once, showing it a version of mmcv that it accepts."""
    with quiet_import():
        import mmcv

        actual = mmcv.__version__
        mmcv.__version__ = min(actual, "1.7.0")
        try:
            import mmdet3d.datasets
            import mmdet3d.models  # noqa: F401
        finally:
            mmcv.__version__ = actual
