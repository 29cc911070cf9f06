"""Sparse convolutions on CUDA that give equal bits in equal runs."""

from cumm import dtypes
from cumm.conv.bases import ConvOpType
from cumm.conv.main import ConvAlgoParams
from spconv.core import ALL_IMPGEMM_PARAMS
from spconv.pytorch import ops


def keep_to_one_order_of_sums() -> None:
    """Let spconv choose among kernels that add in one order only, for float32 forwards, in the whole process.

    On the first convolution of each size spconv times its kernels and keeps the fastest. Some of them share a sum out
    among warps, so that the last bits would depend on a race. Nothing changes where there is no CUDA.
    """
    if ops.CONV_CPP is not None:
        ops.CONV_CPP = tuner([params for params in ALL_IMPGEMM_PARAMS if not shares_sums_out(params)])


def shares_sums_out(params: ConvAlgoParams) -> bool:
    """Whether this is a kernel for float32 forwards whose warps have but a share of a tile's inner dimension."""
    forward = params.op_type == ConvOpType.kForward and params.dtype_input == dtypes.float32
    return forward and params.ts[2] != params.wts[2]


def tuner(kernels: list[ConvAlgoParams]) -> object:
    """What chooses the fastest of `kernels`, in place of `spconv.pytorch.ops.CONV_CPP`; needs spconv's CUDA build."""
    from spconv.algo import ConvTunerSimple
    from spconv.algocore import get_conv_algo_desp_from_param

    return ConvTunerSimple(list(map(get_conv_algo_desp_from_param, kernels)))
