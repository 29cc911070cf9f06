"""Imports our registry before any test module does: mmdet3d can be imported only after it."""

import bevfusion.registry  # noqa: F401
