"""Camera features to bird's-eye view: lift each pixel along its ray, splat into the BEV grid.

Follows Lift, Splat, Shoot (Philion and Fidler, 2020) and BEVFusion's `LSSTransform` and `DepthLSSTransform`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmcv.runner import force_fp32
from torch import Tensor, nn

from bevfusion.ops.bev_pool import PoolingPlan, bev_pool, plan_pooling
from bevfusion.registry import MODELS

Bound = tuple[float, float, float]


class CameraGeometry(NamedTuple):
    """Matrices of one batch, float; N cameras.

    Attributes:
        intrinsics, camera2lidar, lidar2image, image_aug: (B, N, 4, 4).
        lidar_aug: (B, 4, 4).
    """

    intrinsics: Tensor
    camera2lidar: Tensor
    lidar2image: Tensor
    image_aug: Tensor
    lidar_aug: Tensor


def _conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(True)]


def _bev_downsample(channels: int, factor: int) -> nn.Module:
    if factor == 1:
        return nn.Identity()
    strides = (1, factor, 1)
    return nn.Sequential(*(m for s in strides for m in _conv_norm_relu(channels, channels, 3, s, bias=False)))


def checkpoint_linspace(end: float, steps: int) -> Tensor:
    """Return `steps` float32 numbers from 0 to `end`, rounded as in the frustum that trained checkpoints hold.

    torch 1.x on AVX2 stepped in runs of eight from a start that counts from the nearer end; today's `linspace` differs
    in the last bit, which moves a few frustum points into the next BEV cell.
    """
    lanes = 8
    step = np.float32(end) / np.float32(steps - 1)
    index = np.arange(steps)
    vectorised = steps // (2 * lanes) * (2 * lanes)
    start = np.where(index < vectorised, index // lanes * lanes, index)
    from_end = np.float64(end) - np.float64(step) * (steps - start - 1)
    base = np.where(start < steps // 2, np.float64(step) * start, from_end).astype(np.float32)
    return torch.from_numpy(base + step * (index - start).astype(np.float32))


def depth_map(points: Tensor, geometry: CameraGeometry, frame: int, image_size: tuple[int, int]) -> Tensor:
    """Project one frame's points (P, >=3) into its cameras: (N, 1, H, W) metres, 0 where no point falls.

    Of several points on one pixel the last counts, on every device. The points are left as they are: the original
    undoes the LiDAR augmentation in place, which corrupts the LiDAR branch when that runs later.
    """
    height, width = image_size
    lidar_aug, image_aug = geometry.lidar_aug[frame], geometry.image_aug[frame]
    lidar2image = geometry.lidar2image[frame]
    xyz = torch.inverse(lidar_aug[:3, :3]) @ (points[:, :3] - lidar_aug[:3, 3]).T
    rays = lidar2image[:, :3, :3] @ xyz + lidar2image[:, :3, 3:4]
    distance = rays[:, 2]
    depth = distance.clamp(1e-5, 1e5).unsqueeze(1)
    pixels = image_aug[:, :3, :3] @ torch.cat([rays[:, :2] / depth, depth], dim=1) + image_aug[:, :3, 3:4]
    column, row = pixels[:, 0], pixels[:, 1]

    cameras = len(distance)
    camera, point = ((row >= 0) & (row < height) & (column >= 0) & (column < width)).nonzero(as_tuple=True)
    cell = (camera * height + row[camera, point].long()) * width + column[camera, point].long()
    last = torch.zeros(cameras * height * width, dtype=torch.long, device=points.device)
    last.scatter_reduce_(0, cell, point + 1, "amax")
    hit = last > 0
    depths = torch.zeros(len(last), dtype=distance.dtype, device=points.device)
    depths[hit] = distance.reshape(-1)[hit.nonzero().squeeze(1) // (height * width) * distance.shape[1] + last[hit] - 1]
    return depths.view(cameras, 1, height, width)


class BaseTransform(nn.Module):
    """What all lift-splat transforms share: the frustum, the BEV grid, and the pooling.

    Args:
        in_channels: channels of the camera feature maps.
        out_channels: channels of the BEV map.
        image_size: (height, width) of the network's input image in pixels.
        feature_size: (height, width) of the camera feature map.
        xbound, ybound, zbound: (lower, upper, step) of the BEV grid in metres.
        dbound: (nearest, farthest, step) of the depth bins in metres.
        downsample: stride of the convolutions after pooling, 1 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Sequence[int],
        feature_size: Sequence[int],
        xbound: Bound,
        ybound: Bound,
        zbound: Bound,
        dbound: Bound,
        downsample: int = 1,
    ):
        super().__init__()
        bounds = (xbound, ybound, zbound)
        self.image_size = tuple(image_size)
        self.context_channels = out_channels
        self.grid = tuple(int((upper - lower) / step) for lower, upper, step in bounds)
        self.register_buffer("dx", torch.tensor([step for _, _, step in bounds]))
        self.register_buffer("bx", torch.tensor([lower + step / 2 for lower, _, step in bounds]))
        self.register_buffer("nx", torch.tensor(self.grid))
        self.register_buffer("frustum", self._frustum(feature_size, dbound))
        self.depth_bins = len(self.frustum)
        self.downsample = _bev_downsample(out_channels, downsample)
        self.fp16_enabled = False
        self._cached_plan: tuple[CameraGeometry, PoolingPlan] | None = None

    def __getstate__(self) -> dict:
        """Leave the cached plan out of pickles and copies."""
        return {**super().__getstate__(), "_cached_plan": None}

    def _frustum(self, feature_size: Sequence[int], dbound: Bound) -> Tensor:
        """Pixel column, pixel row and depth of every frustum point: (D, H, W, 3)."""
        (height, width), (rows, columns) = self.image_size, feature_size
        depth = torch.arange(*dbound, dtype=torch.float)
        row, column = checkpoint_linspace(height - 1, rows), checkpoint_linspace(width - 1, columns)
        d, v, u = torch.meshgrid(depth, row, column, indexing="ij")
        return torch.stack((u, v, d), dim=-1)

    @force_fp32()
    def frustum_points(self, geometry: CameraGeometry) -> Tensor:
        """Place the frustum points in the (augmented) LiDAR frame: (B, N, D, H, W, 3) metres."""
        batch, cameras = geometry.intrinsics.shape[:2]
        rotation, offset = geometry.image_aug[..., :3, :3], geometry.image_aug[..., :3, 3]
        points = self.frustum.view(1, 1, -1, 3) - offset.unsqueeze(2)
        points = points @ torch.inverse(rotation).transpose(-1, -2)
        points = torch.cat((points[..., :2] * points[..., 2:], points[..., 2:]), dim=-1)
        to_lidar = geometry.camera2lidar[..., :3, :3] @ torch.inverse(geometry.intrinsics[..., :3, :3])
        points = points @ to_lidar.transpose(-1, -2) + geometry.camera2lidar[..., None, :3, 3]
        lidar_aug = geometry.lidar_aug[:, None]
        points = points @ lidar_aug[..., :3, :3].transpose(-1, -2) + lidar_aug[..., None, :3, 3]
        return points.view(batch, cameras, *self.frustum.shape)

    def pooling_plan(self, geometry: CameraGeometry) -> PoolingPlan:
        """Sort the frustum points into BEV cells; in evaluation the plan is kept while the matrices stay the same."""
        if self._cached_plan is not None:
            known, plan = self._cached_plan
            if all(a.device == b.device and torch.equal(a, b) for a, b in zip(known, geometry, strict=True)):
                return plan
        cells = ((self.frustum_points(geometry) - (self.bx - self.dx / 2)) / self.dx).long()
        plan = plan_pooling(cells, self.grid)
        self._cached_plan = None if self.training else (CameraGeometry(*(m.clone() for m in geometry)), plan)
        return plan

    @force_fp32(apply_to=("depth", "context"))
    def splat(self, depth: Tensor, context: Tensor, geometry: CameraGeometry) -> Tensor:
        """Pool depth (B*N, D, H, W) times context (B*N, C, H, W) into the BEV grid (B, C, X, Y)."""
        return bev_pool(depth, context, self.pooling_plan(geometry), len(geometry.lidar_aug), self.grid)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split (M, D + C, H, W) into the depth distribution (M, D, H, W) and the context (M, C, H, W)."""
        depth, context = x.split([self.depth_bins, self.context_channels], dim=1)
        return depth.softmax(dim=1), context


@MODELS.register_module()
class LSSTransform(BaseTransform):
    """Lift-splat with depth predicted from the image alone."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        self.depthnet = nn.Conv2d(in_channels, self.depth_bins + out_channels, 1)

    def lift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map camera features (M, C_in, H, W) to a depth distribution and context features."""
        return self.split(self.depthnet(x))

    def forward(self, x: Tensor, points: Sequence[Tensor], geometry: CameraGeometry) -> Tensor:
        """Map camera features (B, N, C_in, H, W) to the BEV map (B, C, X, Y); `points` are not used."""
        return self.downsample(self.splat(*self.lift(x.flatten(0, 1)), geometry))


class DepthMaps(nn.Module):
    """Projects LiDAR points into the cameras' images; a module, as what it gives depends on no weight before it.

    Args:
        image_size: (height, width) of the network's input image in pixels.
    """

    def __init__(self, image_size: tuple[int, int]):
        super().__init__()
        self.image_size = image_size
        self.fp16_enabled = False

    @force_fp32()
    @torch.no_grad()
    def forward(self, points: Sequence[Tensor], geometry: CameraGeometry) -> Tensor:
        """Project each frame's points (P_i, >=3) into its cameras: (B, N, 1, H, W) metres."""
        maps = [depth_map(cloud.float(), geometry, frame, self.image_size) for frame, cloud in enumerate(points)]
        return torch.stack(maps)


@MODELS.register_module()
class DepthLSSTransform(BaseTransform):
    """Lift-splat whose depth is predicted from the image and the projected LiDAR points."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        self.depth_maps = DepthMaps(self.image_size)
        self.dtransform = nn.Sequential(
            *_conv_norm_relu(1, 8, 1), *_conv_norm_relu(8, 32, 5, stride=4), *_conv_norm_relu(32, 64, 5, stride=2)
        )
        self.depthnet = nn.Sequential(
            *_conv_norm_relu(in_channels + 64, in_channels, 3),
            *_conv_norm_relu(in_channels, in_channels, 3),
            nn.Conv2d(in_channels, self.depth_bins + out_channels, 1),
        )

    def lift(self, x: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (M, C_in, H, W) and depth maps (M, 1, 8H, 8W) to a depth distribution and context features."""
        return self.split(self.depthnet(torch.cat([self.dtransform(depths), x], dim=1)))

    def forward(self, x: Tensor, points: Sequence[Tensor], geometry: CameraGeometry) -> Tensor:
        """Map camera features (B, N, C_in, H, W) and points, a list of (P_i, >=3), to the BEV map (B, C, X, Y)."""
        depths = self.depth_maps(points, geometry).flatten(0, 1)
        return self.downsample(self.splat(*self.lift(x.flatten(0, 1), depths), geometry))
