"""Sparse convolutions on CUDA that give equal bits in equal runs."""

from unittest import mock

import pytest
import torch
from cumm import dtypes
from cumm.conv.bases import ConvOpType
from spconv.core import ALL_IMPGEMM_PARAMS
from spconv.pytorch import SparseConvTensor, ops

from bevfusion.ops.repeatable import keep_to_one_order_of_sums, shares_sums_out, tuner
from bevfusion.ops.sparse import SubMConv3d

FLOAT = [p for p in ALL_IMPGEMM_PARAMS if p.op_type == ConvOpType.kForward and p.dtype_input == dtypes.float32]


def test_only_kernels_for_float32_forwards_are_left_out_and_not_all_of_them():
    left_out = [params for params in ALL_IMPGEMM_PARAMS if shares_sums_out(params)]
    assert left_out
    assert set(map(id, left_out)) < set(map(id, FLOAT))


@pytest.mark.parametrize("has_cuda", [True, False])
def test_spconvs_choice_is_replaced_where_it_has_one(has_cuda):
    theirs = object() if has_cuda else None
    with mock.patch.object(ops, "CONV_CPP", theirs), mock.patch("bevfusion.ops.repeatable.tuner", list):
        keep_to_one_order_of_sums()
        ours = ops.CONV_CPP
    if not has_cuda:
        assert ours is None
        return
    assert not any(map(shares_sums_out, ours))
    assert len(ours) + sum(map(shares_sums_out, ALL_IMPGEMM_PARAMS)) == len(ALL_IMPGEMM_PARAMS)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [5, 16, 64, 128])
def test_the_kernels_that_are_left_give_equal_bits(channels):
    torch.manual_seed(0)
    cells = torch.nonzero(torch.rand(1, 40, 40, 11) < 0.2).int().contiguous().cuda()
    layer = SubMConv3d(channels, max(channels, 16), 3, padding=1, bias=False).cuda().eval()
    features = torch.randn(len(cells), channels, device="cuda")
    kernels = [p for p in FLOAT if not (p.tensorop or p.dynamic_mask or shares_sums_out(p))]
    outputs = []
    with torch.no_grad():
        for kernel in kernels:
            with mock.patch.object(ops, "CONV_CPP", tuner([kernel])):
                outputs.append(layer(SparseConvTensor(features, cells, [40, 40, 11], 1)).features)
    assert len(kernels) > 1
    assert all(torch.equal(output, outputs[0]) for output in outputs)
