"""Compares the fused form of an operator with its plain form in float64: on a GPU, or in Triton's interpreter."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton, in a process with TRITON_INTERPRET=1")
on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=needs_interpreter),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Largest error relative to the largest value: of float32 sums, and of bfloat16, which the interpreter truncates."""


def some(*shape: int, device: str, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """Random features in channels_last, or a random tensor of another number of dimensions; it requires grad."""
    x = (mean + torch.randn(shape)).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
    return x.requires_grad_()


def assert_close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    error = (ours.detach().double() - exact.detach()).abs().max().item()
    assert error <= tolerance * exact.detach().abs().max().item(), error


def assert_equal_forms(fused: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """Result and gradients of the fused form are those of the plain one in float64, in the dtypes of the inputs."""
    results: list[Any] = []
    grad = None
    for form, dtype in ((fused, None), (plain, torch.float64)):
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = form(*inputs)
        grad = torch.randn_like(y) if grad is None else grad
        results.append((y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))))
    for ours, exact, like in zip(*results, (tensors[0], *tensors), strict=True):
        assert ours.dtype == like.dtype
        if ours.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, exact, TOLERANCES[tensors[0].dtype])


def assert_equal_second_derivatives(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> None:
    """The gradient of a squared slope, as in R1, is that of the plain form in float64."""
    results: list[Any] = []
    weight = None
    for form, dtype in ((fused, None), (plain, torch.float64)):
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = form(*inputs)
        weight = torch.randn_like(y) if weight is None else weight
        # The cube makes the slope depend on y, the weight on the place.
        (slope,) = torch.autograd.grad((y**3 * weight.to(y.dtype)).sum(), inputs[:1], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), inputs))
    for ours, exact in zip(*results, strict=True):
        # Three operations in a row, each with a rounding of its own.
        assert_close(ours, exact, 4 * TOLERANCES[tensors[0].dtype])
