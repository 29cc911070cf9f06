"""Voxelisation, BEV pooling and sparse convolution against plain references."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmcv.ops import Voxelization as MmcvVoxelization
from spconv.pytorch import SparseConvTensor
from torch import nn

from bevfusion.errors import InputError
from bevfusion.models.view_transform import CameraGeometry, DepthLSSTransform, LSSTransform, depth_map
from bevfusion.ops.bev_pool import bev_pool, plan_pooling
from bevfusion.ops.sparse import SparseConv3d, SubMConv3d
from bevfusion.ops.voxelize import Voxelization

RANGE = [-4.0, -3.0, -1.0, 4.0, 3.0, 1.0]
SIZE = [0.5, 0.25, 0.5]


def cloud(points: int, channels: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(points, channels, generator=generator) * torch.tensor([3.0, 2.0, 1.0] + [1.0] * (channels - 3))


@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize(("max_points", "max_voxels"), [(3, 10_000), (10, 100), (1, 7)])
def test_voxels_equal_mmcvs(max_points, max_voxels, channels):
    points = cloud(3000, channels)
    features, coordinates = Voxelization(SIZE, RANGE, max_points, max_voxels)([points])
    theirs = MmcvVoxelization(SIZE, RANGE, max_points, max_voxels)
    voxels, zyx, counts = theirs(points)
    torch.testing.assert_close(coordinates[:, 1:], zyx.flip(1))
    assert (coordinates[:, 0] == 0).all()
    torch.testing.assert_close(features, voxels.sum(1) / counts[:, None])


def test_voxels_of_a_batch_carry_the_frame_and_empty_clouds_give_none():
    module = Voxelization(SIZE, RANGE, 10, (50, 100))
    features, coordinates = module([cloud(0), cloud(200, seed=1), cloud(100, seed=2)])
    assert set(coordinates[:, 0].tolist()) == {1, 2}
    alone, _ = module([cloud(100, seed=2)])
    torch.testing.assert_close(features[coordinates[:, 0] == 2], alone)
    assert module([cloud(0)])[0].shape == (0, 5)


def test_training_and_testing_have_their_own_voxel_limits():
    module = Voxelization(SIZE, RANGE, 10, [5, 20])
    assert len(module.train()([cloud(500)])[0]) == 5
    assert len(module.eval()([cloud(500)])[0]) == 20


def test_dynamic_voxels_are_refused():
    with pytest.raises(InputError, match="max_num_points"):
        Voxelization(SIZE, RANGE, -1)


def dense_pool(depth, context, cells, grid):
    """The frustum volume, materialised, added point by point."""
    batch, cameras, bins, height, width, _ = cells.shape
    nx, ny, nz = grid
    volume = depth.view(batch, cameras, bins, 1, height, width) * context.view(batch, cameras, 1, -1, height, width)
    out = torch.zeros(batch, nz, nx, ny, context.shape[1], dtype=depth.dtype)
    for b, n, d, h, w in np.ndindex(batch, cameras, bins, height, width):
        x, y, z = cells[b, n, d, h, w].tolist()
        if 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
            out[b, z, x, y] = out[b, z, x, y] + volume[b, n, d, :, h, w]
    return out.permute(0, 1, 4, 2, 3).reshape(batch, -1, nx, ny)


def test_bev_pool_equals_the_materialised_volume_and_has_gradients():
    generator = torch.Generator().manual_seed(0)
    grid = (5, 4, 2)
    cells = torch.randint(-1, 6, (2, 2, 3, 2, 3, 3), generator=generator)
    depth = torch.rand(4, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 6, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    plan = plan_pooling(cells, grid)
    expected = dense_pool(depth, context, cells, grid)
    torch.testing.assert_close(bev_pool(depth, context, plan, 2, grid), expected)

    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), (depth, context))
    got = torch.autograd.grad((bev_pool(depth, context, plan, 2, grid) * weight).sum(), (depth, context))
    torch.testing.assert_close(got, wanted)


def geometry(batch: int = 1, cameras: int = 2) -> CameraGeometry:
    """Cameras at the origin looking along +x and -x of a LiDAR frame with z up; no augmentation."""
    intrinsics = torch.eye(4).repeat(batch, cameras, 1, 1)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = 40.0
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = 32.0, 16.0
    camera2lidar = torch.zeros(batch, cameras, 4, 4)
    camera2lidar[..., 3, 3] = 1
    for index in range(cameras):
        sign = 1.0 if index % 2 == 0 else -1.0
        camera2lidar[:, index, 0, 2], camera2lidar[:, index, 1, 0], camera2lidar[:, index, 2, 1] = sign, -sign, -1.0
    lidar2image = intrinsics @ torch.inverse(camera2lidar)
    image_aug = torch.eye(4).repeat(batch, cameras, 1, 1)
    return CameraGeometry(intrinsics, camera2lidar, lidar2image, image_aug, torch.eye(4).repeat(batch, 1, 1))


def test_depth_map_keeps_the_last_point_of_a_pixel_and_leaves_the_points_alone():
    points = torch.tensor([[10.0, 0.0, 0.0], [20.0, 0.0, 0.0], [-5.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    before = points.clone()
    maps = depth_map(points, geometry(), 0, (32, 64))
    assert torch.equal(points, before)
    assert maps.shape == (2, 1, 32, 64)
    assert maps[0, 0, 16, 32] == 20.0
    assert maps[1, 0, 16, 32] == 5.0
    assert (maps > 0).sum() == 2


VIEW = {
    "image_size": (32, 64),
    "feature_size": (4, 8),
    "xbound": (-8.0, 8.0, 0.5),
    "ybound": (-8.0, 8.0, 0.5),
    "zbound": (-10.0, 10.0, 20.0),
    "dbound": (1.0, 9.0, 1.0),
}


@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("kind", [LSSTransform, DepthLSSTransform])
def test_view_transforms_give_a_bev_map_of_the_grids_size(kind, downsample):
    torch.manual_seed(0)
    view = kind(6, 10, **VIEW, downsample=downsample).eval()
    out = view(torch.randn(1, 2, 6, 4, 8), [cloud(50)], geometry())
    assert out.shape == (1, 10, 32 // downsample, 32 // downsample)
    assert torch.isfinite(out).all()


def test_the_pooling_plan_is_kept_while_the_matrices_stay_and_stays_out_of_copies():
    view = LSSTransform(6, 10, **VIEW).eval()
    first = view.pooling_plan(geometry())
    assert view.pooling_plan(geometry()) is first
    moved = geometry()
    moved.camera2lidar[..., 0, 3] = 1.0
    other = view.pooling_plan(moved)
    assert other is not first
    fresh = LSSTransform(6, 10, **VIEW).eval().pooling_plan(moved)
    assert all(torch.equal(a, b) for a, b in zip(other, fresh, strict=True))
    assert copy.deepcopy(view)._cached_plan is None
    assert pickle.loads(pickle.dumps(view))._cached_plan is None


def dense_input(shape=(6, 5, 4), channels=3, voxels=40):
    generator = torch.Generator().manual_seed(3)
    flat = torch.randperm(int(np.prod(shape)), generator=generator)[:voxels]
    coordinates = torch.stack((torch.zeros_like(flat), *torch.unravel_index(flat, shape)), dim=1).int()
    features = torch.randn(voxels, channels, generator=generator)
    dense = torch.zeros(1, channels, *shape)
    x, y, z = coordinates[:, 1:].long().T
    dense[0, :, x, y, z] = features.T
    return SparseConvTensor(features, coordinates, list(shape), 1), dense


@pytest.mark.parametrize("threads", [1, 2])
def test_sparse_convolutions_equal_dense_ones_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sparse, dense = dense_input(shape=(40, 40, 20), channels=16, voxels=8000)
        conv = SubMConv3d(16, 32, 3, padding=1, bias=False, indice_key="a")
        down = SparseConv3d(16, 32, 3, stride=2, padding=(1, 1, 0), bias=False)
        with torch.no_grad():
            here = conv(sparse)
            expected = nn.functional.conv3d(dense, conv.weight.permute(0, 4, 1, 2, 3), padding=1)
            x, y, z = here.indices[:, 1:].long().T
            torch.testing.assert_close(here.features, expected[0][:, x, y, z].T, rtol=1e-4, atol=1e-4)
            expected = nn.functional.conv3d(dense, down.weight.permute(0, 4, 1, 2, 3), stride=2, padding=(1, 1, 0))
            torch.testing.assert_close(down(sparse).dense(), expected, rtol=1e-4, atol=1e-4)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
