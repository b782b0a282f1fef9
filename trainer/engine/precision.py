"""Number types of the computation: what a device has, and whether float32 products may be computed in TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
"""`fp32`: float32 products. `tf32`: float32 tensors, whose products keep 10 bits of each factor's mantissa on a GPU.
`bf16`: bfloat16 activations; what stays in float32 has TF32 products."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
"""From the most exact to the fastest."""
BF16_CAPABILITY = (8, 0)
"""Compute capability from which a GPU multiplies in bfloat16, and in TF32: none has only one of the two."""


def best_precision(device: torch.device) -> Precision:
    """The fastest precision that the hardware of a device multiplies in."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else "fp32"


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 convolutions and matrix products on GPUs do not use TF32, as on CPUs."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if allowed:
        allow_tf32(False)
    try:
        yield
    finally:
        if allowed:
            allow_tf32(True)


def allow_tf32(allowed: bool) -> None:
    """Let this process's float32 convolutions and matrix products on GPUs use TF32, or forbid it. CPUs never do."""
    # The settings named allow_tf32 are the former interface, fp32_precision the current one. torch refuses to read
    # the former when only the current ones were set, and its compiler reads both.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    cudnn: Any = torch.backends.cudnn
    for products in (cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul):
        products.fp32_precision = "tf32" if allowed else "ieee"
