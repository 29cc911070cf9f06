"""A synthetic world in the format of nuScenes: one 3-D street scene seen by six cameras and a LiDAR.

`generate` writes the data set; ``python -m bevfusion.synthetic`` does so from the command line. The way of the data:
`build` (street, objects, motion) -> `Scene.view` (solids at one moment) -> `lidar.scan`, `shading.render` -> `capture`
(files of a keyframe) -> `tables`. Nothing in here needs torch or mmdet3d.
"""

from bevfusion.synthetic.world import generate

__all__ = ["generate"]
