"""What TF32 and bfloat16 products put into the penalty R1: emulated on the CPU, and compared with float64.

A GPU's TF32 product reads 10 bits of each factor's mantissa and sums in float32. Here the factors of each convolution
and matrix product of the forward pass, the backward pass and the double backward pass are rounded before the product.

`python -m tests.models.published.rounded_products` prints the table of docs/experiments.md.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.published.state_dict import discriminator_from

aten = torch.ops.aten
FACTORS: dict[Any, tuple[int, ...]] = {
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
}
"""Positions of the factors among the arguments."""
MANTISSA_BITS = {"fp32": 23, "tf32": 10, "bf16": 7}


def rounded(x: Tensor, bits: int) -> Tensor:
    """x, float32, with its mantissa rounded to `bits` bits, to the nearest and to even."""
    drop = 23 - bits
    whole = x.contiguous().view(torch.int32)
    even = (whole >> drop) & 1
    return ((whole + (1 << drop - 1) - 1 + even) >> drop << drop).view(torch.float32)


class RoundedFactors(TorchDispatchMode):
    """Rounds the factors of all float32 products while it is entered, and counts the products."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.num_products = bits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in FACTORS:
            self.num_products += 1
            args = list(args)
            for position in FACTORS[func]:
                args[position] = rounded(args[position], self.bits)
        return func(*args, **(kwargs or {}))


def penalty_and_gradient(discriminator: nn.Module, inputs: Sequence[Tensor], bits: int = 23) -> tuple[Tensor, Tensor]:
    """R1 and its gradient with respect to all parameters, as one vector, float64.

    Args:
        discriminator: float64 for the exact values, otherwise float32.
        inputs: x_tm1, x_t, t.
        bits: of the factors' mantissas.
    """
    dtype = next(discriminator.parameters()).dtype
    x_tm1, x_t, t = inputs[0].detach().to(dtype).requires_grad_(), inputs[1].to(dtype), inputs[2]
    with RoundedFactors(bits) if bits < 23 else nullcontext():
        (slope,) = torch.autograd.grad(discriminator(x_tm1, x_t, t).sum(), x_tm1, create_graph=True)
        penalty = slope.square().sum(dim=(1, 2, 3)).mean()
        gradients = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)
    flat = [g.double().flatten() for g in gradients if g is not None]
    return penalty.detach().double(), torch.cat(flat)


def errors(discriminator: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
    """For each precision the relative error of the penalty, and the L2 norm of the gradient's error by its own norm."""
    measured = {name: penalty_and_gradient(discriminator.float(), inputs, bits) for name, bits in MANTISSA_BITS.items()}
    penalty, gradient = penalty_and_gradient(discriminator.double(), inputs)
    return {
        name: ((p - penalty).abs().item() / penalty.item(), ((g - gradient).norm() / gradient.norm()).item())
        for name, (p, g) in measured.items()
    }


def table() -> str:
    """The table of docs/experiments.md."""
    rows = []
    for kind in ("small", "large"):
        with np.load(Path(__file__).parents[2] / "golden" / f"discriminator_{kind}.npz") as file:
            arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "config"}
            settings = json.loads(str(file["config"]))
        state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
        discriminator = discriminator_from(settings, state)
        rows.append((kind, discriminator, [arrays[name] for name in ("x_tm1", "x_t", "t")]))
    lines = ["| discriminator | factors | error of R1 | error of its gradient |", "|---|---|---|---|"]
    for name, discriminator, inputs in rows:
        for precision, (of_penalty, of_gradient) in errors(discriminator, inputs).items():
            lines.append(f"| {name} | {precision} | {of_penalty:.1e} | {of_gradient:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
