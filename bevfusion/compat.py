"""Import mmdet3d 1.0.0rc6 beside mmcv-full 1.7.2.

mmdet3d 1.0.0rc6 asserts ``mmcv.__version__ <= 1.7.0``; 1.7.2 is the first mmcv-full that builds against
torch >= 2.1 and differs from 1.7.0 in build fixes only. The version is understated for the moment of the import.
"""

import mmcv


def import_mmdet3d() -> None:
    """Import mmdet3d once, showing it a version of mmcv that it accepts."""
    actual = mmcv.__version__
    mmcv.__version__ = min(actual, "1.7.0")
    try:
        import mmdet3d  # noqa: F401
    finally:
        mmcv.__version__ = actual
