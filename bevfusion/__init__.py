"""BEVFusion: the float model, its data sets and operators, registered through mmdet3d.

This package knows nothing of quantisation.
"""

from bevfusion.compat import import_mmdet3d

__version__ = "0.1.0"

import_mmdet3d()
