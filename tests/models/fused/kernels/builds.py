"""Builds every kernel for an H100, which needs no GPU, and prints one line for each.

python -m tests.models.fused.kernels.builds
"""

from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.fused.kernels import elementwise, fir, norm, whole_norm

H100 = GPUTarget("cuda", 90, 32)
CONSTANTS = {"BLOCK": 4096, "BLOCK_P": 32, "BLOCK_C": 128, "BLOCK_S": 128, "BLOCK_K": 4, "SILU": True, "STRIDE": 2}
CONSTANTS |= {"K": 8, "SLAB": 128, "JOINS": True, "SHIFTS": True, "NUM_MORE": 2, "ADDS": True}
FLOATS = {"eps", "gain", "scale", "slope"}
FEATURES = {"x_ptr", "y_ptr", "a_ptr", "b_ptr", "grad_ptr", "out_ptr", "style_ptr", "bias_ptr", "shift_ptr"}
FEATURES |= {"more_ptr", "rest_ptr"}
"""Arguments in bfloat16; others are float32."""
ALIGNED = {"C", "C_A", "numel", "style_stride", "shift_stride", "bias_stride"}
"""Integers that are multiples of 16, as in the published networks."""


def kernels(module: ModuleType) -> list[triton.JITFunction]:
    """The kernels of a file, without the functions that they call."""
    functions = [value for name, value in vars(module).items() if not name.startswith("_")]
    return [f for f in functions if isinstance(f, triton.JITFunction)]


def built(kernel: triton.JITFunction) -> str:
    """The kernel's PTX.

    Raises:
        Exception: it cannot be built.
    """
    names, constant = kernel.arg_names, {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature = {
        name: "constexpr"
        if name in constant
        else ("*bf16" if name in FEATURES else "*fp32")
        if name.endswith("_ptr")
        else ("fp32" if name in FLOATS else "i32")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in ALIGNED}
    constants = {name: CONSTANTS[name] for name in constant}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=H100).asm["ptx"]


if __name__ == "__main__":
    for module in (elementwise, fir, norm, whole_norm):
        for kernel in kernels(module):
            ptx = built(kernel)
            wide = ptx.count(".v4.b32") + ptx.count(".v4.u32")
            atomics = ptx.count("atom.global") + ptx.count("red.global")
            print(kernel.__name__, "wide accesses:", wide, "atomics:", atomics)  # noqa: T201
