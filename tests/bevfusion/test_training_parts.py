"""What training needs of model and operators: heatmap targets, gradients of sparse convolutions, initial weights."""

import pytest
import torch
import torch.nn.functional as F
from mmdet3d.core import draw_heatmap_gaussian, gaussian_radius
from spconv.pytorch import SparseConvTensor

from bevfusion.config import load_config
from bevfusion.models import build_model
from bevfusion.models.transfusion_loss import draw_gaussians, gaussian_radii
from bevfusion.ops.sparse import SparseConv3d, SubMConv3d
from tests.conftest import ROOT

DEMO = ROOT / "configs/demo/camera+lidar/resnet50.yaml"


@pytest.fixture(scope="module")
def demo():
    return load_config(DEMO)


def random_boxes(count, extent):
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 9, generator=generator)
    boxes[:, :2] = (2 * boxes[:, :2] - 1) * extent
    boxes[:, 3:6] = 0.3 + 12 * boxes[:, 3:6] ** 3
    return boxes, torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize("count", [0, 1, 60])
def test_heatmaps_equal_those_drawn_box_by_box(demo, count):
    loss = build_model(demo.model).heads["object"].loss_fn
    boxes, labels = random_boxes(count, 51.1)
    expected = torch.zeros(10, 128, 128)
    for box, label in zip(boxes, labels, strict=True):
        x, y = ((box[:2] + 51.2) / 0.8).int().tolist()
        radius = max(2, int(gaussian_radius(box[3:5] / 0.8, min_overlap=0.1)))
        draw_heatmap_gaussian(expected[label], (y, x), radius)  # it counts (column, row); the map is indexed (x, y)
    drawn = loss.heatmap_target(boxes, labels)
    torch.testing.assert_close(drawn, expected)
    assert drawn.eq(1).sum() == expected.eq(1).sum()


def test_boxes_without_extent_are_not_drawn(demo):
    loss = build_model(demo.model).heads["object"].loss_fn
    boxes, labels = random_boxes(2, 20.0)
    boxes[0, 3] = 0
    torch.testing.assert_close(loss.heatmap_target(boxes, labels), loss.heatmap_target(boxes[1:], labels[1:]))


def test_gaussians_end_at_their_radius_and_at_the_border():
    drawn = draw_gaussians(torch.tensor([[0, 5]]), torch.tensor([2]), (8, 8))[0]
    assert (drawn > 0).nonzero().amin(0).tolist() == [0, 3]
    assert (drawn > 0).nonzero().amax(0).tolist() == [2, 7]
    assert drawn[0, 5] == drawn.max() == 1


def test_radii_grow_with_the_box_and_shrink_with_the_overlap():
    sizes = torch.tensor([[2.0, 4.0], [4.0, 8.0]])
    small, large = gaussian_radii(sizes, 0.1)
    assert large == pytest.approx(2 * small)
    assert gaussian_radii(sizes, 0.5)[0] < small


@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_gradients_of_sparse_convolutions_on_the_cpu_equal_dense_ones(kind):
    torch.manual_seed(0)
    cells = torch.cat([torch.randint(0, 2, (80, 1)), torch.randint(0, 6, (80, 3))], dim=1)
    cells = torch.unique(cells, dim=0).int()
    features = torch.randn(len(cells), 3, requires_grad=True)
    stride = {} if kind is SubMConv3d else {"stride": 2}
    conv = kind(3, 4, 3, padding=1, bias=False, indice_key="key", **stride)
    out = conv(SparseConvTensor(features, cells, [6, 6, 6], 2))
    direction = torch.randn_like(out.features)
    found = torch.autograd.grad((out.features * direction).sum(), [features, conv.weight])

    dense = SparseConvTensor(features, cells, [6, 6, 6], 2).dense()
    volume = F.conv3d(dense, conv.weight.permute(0, 4, 1, 2, 3), padding=1, **stride)
    batch, x, y, z = out.indices.long().unbind(1)
    at_outputs = volume[batch, :, x, y, z]
    torch.testing.assert_close(out.features, at_outputs)
    expected = torch.autograd.grad((at_outputs * direction).sum(), [features, conv.weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pretrained_weights_reach_the_backbone(demo, tmp_path):
    backbone = build_model(demo.model).encoders["camera"]["backbone"]
    state = {key: torch.full_like(value, 0.25) for key, value in backbone.state_dict().items()}
    torch.save(state, tmp_path / "backbone.pth")
    camera = {**demo.model.encoders.camera}
    camera["backbone"] = {
        **camera["backbone"],
        "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "backbone.pth")},
    }
    config = {**demo.model, "encoders": {**demo.model.encoders, "camera": camera}}
    assert (build_model(config, pretrained=True).encoders["camera"]["backbone"].conv1.weight == 0.25).all()
    assert not (build_model(config).encoders["camera"]["backbone"].conv1.weight == 0.25).any()


def test_the_demo_model_is_small_and_has_every_kind_of_layer(demo):
    model = build_model(demo.model)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2.5e6
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"Bottleneck", "GeneralizedLSSFPN", "DepthLSSTransform", "SparseBasicBlock", "ConvFuser", "SECOND"} <= kinds
    assert {"SECONDFPN", "TransFusionHead", "TransformerDecoderLayer", "ConvTranspose2d", "SubMConv3d"} <= kinds
    full = build_model(
        load_config(ROOT / "configs/nuscenes/det/transfusion/secfpn/camera+lidar/resnet50/convfuser.yaml").model
    )
    assert {type(module).__name__ for module in full.modules()} == kinds
