"""BEVFusion: the float model, its data sets and operators, registered through mmdet3d.

This package knows nothing of quantisation.
"""

__version__ = "0.1.0"
