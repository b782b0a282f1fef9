"""Convolutions with stride 1 whose second derivative, for R1, is made of ordinary convolutions in channels_last.

torch's own double backward computes the weight's gradient by a convolution of transposed feature maps: it copies both
into another layout, and the filter is as large as the image. Here it is the same weight gradient as in any backward
pass, as in StyleGAN3's `conv2d_gradfix`. Numbers differ by rounding only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.layout import is_channels_last
from models.shapes import Features


class Convolution(nn.Conv2d):
    """`nn.Conv2d` with stride 1, and with the second derivative of this file where `convolve` has it."""

    def forward(self, input: Features) -> Float[Tensor, "b c_out h_out w_out"]:
        """Convolve."""
        return convolve(input, self.weight, self.bias, self.padding)


def convolve(x: Features, weight: Tensor, bias: Tensor | None, padding: Any) -> Float[Tensor, "b c_out h_out w_out"]:
    """`F.conv2d`; for features in channels_last outside autocast, with the second derivative of this file."""
    if (
        not torch.compiler.is_compiling()
        and is_channels_last(x)
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    ):
        y = _Product.apply(x, weight, padding)
        return y if bias is None else y.add_(bias[:, None, None])
    return F.conv2d(x, weight, bias, padding=padding)


_inputs_only = False


@contextmanager
def gradients_of_inputs() -> Iterator[None]:
    """Inside, backward passes skip the gradients of the weights: for R1's inner gradient, which asks for none.

    torch would tell its own operations, but not those written in Python.
    """
    global _inputs_only
    _inputs_only = True
    try:
        yield
    finally:
        _inputs_only = False


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Any, wanted: int) -> Tensor:
    """Gradient of a convolution with stride 1: of x (`wanted` 0) or of the weight (1)."""
    mask = [wanted == 0, wanted == 1, False]
    arguments = (None, [1, 1], list(padding), [1, 1], False, [0, 0], 1, mask)
    return torch.ops.aten.convolution_backward(grad, x, weight, *arguments)[wanted]


class _Product(Function):
    """y = x * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return torch.conv2d(x, weight, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x = _InputGradient.apply(grad, weight, x, ctx.padding) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1] and not _inputs_only
        of_weight = _gradient(grad, x, weight, ctx.padding, 1) if wanted else None
        return of_x, of_weight, None


class _InputGradient(Function):
    """The gradient of x in `_Product`, linear in `grad` and in the weight; x gives only its shape."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, padding: Any) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.padding = padding
        return _gradient(grad, x, weight, padding, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, weight = ctx.saved_tensors
        of_grad = torch.conv2d(grad, weight, padding=ctx.padding) if ctx.needs_input_grad[0] else None
        of_weight = _gradient(grad_y, grad, weight, ctx.padding, 1) if ctx.needs_input_grad[1] else None
        return of_grad, of_weight, None, None


def filtered(x: Features, kernel: Tensor, *, stride: int, padding: int) -> Tensor:
    """`F.conv2d` of each channel with its constant kernel, [C, 1, K, K].

    torch's double backward would also compute the gradient of the kernel, channel by channel, and discard it.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if plain or not (x.requires_grad and torch.is_grad_enabled()):
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])
    return _Filter.apply(x, kernel, stride, padding)


class _Filter(Function):
    """The filter of `filtered`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.settings = (stride, padding)
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, kernel = ctx.saved_tensors
        return _FilterGradient.apply(grad, kernel, x.detach(), *ctx.settings), None, None, None


class _FilterGradient(Function):
    """The gradient of x in `_Filter`; x gives only its shape."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, kernel: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.settings = (stride, padding)
        arguments = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], x.shape[1], [True, False, False])
        return torch.ops.aten.convolution_backward(grad, x, kernel, *arguments)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kernel,) = ctx.saved_tensors
        stride, padding = ctx.settings
        return filtered(grad, kernel, stride=stride, padding=padding), None, None, None, None
