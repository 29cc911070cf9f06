"""Imports bevfusion before any test module does: mmdet3d can be imported only after it."""

import bevfusion  # noqa: F401
