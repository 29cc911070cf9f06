"""Compiles the Triton kernels for GPUs that needn't be there; exits non-zero if the compiler or assembler refuses."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lean.kernels import cuda

HOPPER, AMPERE = 90, 80
SHARED_MEMORY_OF_A_BLOCK = 48 * 1024  # what needs no opt-in


def compiled(kernel, arguments: dict[str, str], constants: dict, architecture: int, warps: int):
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def main() -> None:
    for architecture, dtype in ((AMPERE, "fp32"), (HOPPER, "fp32"), (HOPPER, "fp16"), (HOPPER, "fp64")):
        arguments = {"x": f"*{dtype}", "counts": "*i64", "extremes": "*i32", "size": "i32"}
        constants = {"SHARED": True, "TILE": cuda._TILE, "THREADS": 32 * cuda._WARPS}
        binary = compiled(cuda._observe, arguments, constants, architecture, cuda._WARPS)
        assert binary.asm["ptx"].count(".shared .align 16 .b32 observed") == 1
        assert "red.shared.add.u32" in binary.asm["ptx"]
        assert binary.metadata.shared + 4 * cuda._SLOTS.value <= SHARED_MEMORY_OF_A_BLOCK
    for architecture, dtype, one in ((AMPERE, "fp32", True), (HOPPER, "fp16", True), (HOPPER, "fp32", False)):
        arguments = {
            "x": f"*{dtype}",
            "amax": "*fp32",
            "out": f"*{dtype}",
            "size": "i32",
            "channels": "i32",
            "inner": "i32",
        }
        constants = {"LOW": -128, "HIGH": 127, "ONE": one, "WIDE": False, "TILE": cuda._QUANTIZE_TILE}
        compiled(cuda._fake_quantize, arguments, constants, architecture, 4)


if __name__ == "__main__":
    main()
