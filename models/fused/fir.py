"""FIR filters with halving or doubling. They are linear, and the gradient of each is another of them.

The taps in each direction are [1, 3, 3, 1] / 8; the sum is multiplied by `gain`.

In plain torch, halving and doubling are written as each other's backward pass. Torch's own second derivative of a
depthwise convolution, which R1 needs, also computes the derivative of the kernel, which is constant, channel by
channel: 5,396 convolutions instead of 148 in an update of lsun256's discriminator with R1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fused.layout import ceil_div, channels_last, tile_of
from models.fused.operator import Operator

TILE = 2048
"""Elements of a tile: every one needs up to 16 products."""


class Halved(torch.autograd.Function):
    """A depthwise convolution of stride 2 with a constant kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(kernel)
        C = x.shape[1]
        return F.conv2d(x, kernel.expand(C, 1, 4, 4), stride=2, padding=1, groups=C)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (kernel,) = ctx.saved_tensors
        return Doubled.apply(grad_outputs[0], kernel), None


class Doubled(torch.autograd.Function):
    """The transposed convolution, which is the derivative of `Halved`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(kernel)
        C = x.shape[1]
        return F.conv_transpose2d(x, kernel.expand(C, 1, 4, 4), stride=2, padding=1, groups=C)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (kernel,) = ctx.saved_tensors
        return Halved.apply(grad_outputs[0], kernel), None


def _kernel(x: Tensor, gain: float) -> Tensor:
    k = torch.arange(4, device=x.device, dtype=x.dtype)  # not copied from the host
    taps = (1 + k * (3 - k)) / 8
    return gain * torch.outer(taps, taps)


def plain_filter(x: Tensor, stride: int, pad: int, gain: float) -> Tensor:
    """Pad, filter, take every `stride`-th pixel, in plain torch."""
    if (stride, pad) == (2, 1):
        return Halved.apply(x, _kernel(x, gain))
    C = x.shape[1]
    return F.conv2d(x, _kernel(x, gain).expand(C, 1, 4, 4), stride=stride, padding=pad, groups=C)


def plain_double(x: Tensor, gain: float, more: Tensor | None = None) -> Tensor:
    """The transpose of `plain_filter` with stride 2 and pad 1, and the sum of it and `more`, in plain torch."""
    y = Doubled.apply(x, _kernel(x, gain))
    return y if more is None else y + more


@torch.library.custom_op("ddgan::fir_filter", mutates_args=())
def fused_filter(x: Tensor, stride: int, pad: int, gain: float) -> Tensor:
    """`plain_filter` in its fused form. Stride 1 with pad 1 or 2, or, for even sizes, stride 2 with pad 1."""
    from models.fused.kernels import fir as kernels

    x = channels_last(x)
    y = _empty_filtered(x, stride, pad, gain)
    (H, W), (B, C, H_out, W_out) = x.shape[2:], y.shape
    tile = tile_of(C, TILE)
    grid = (B * ceil_div(H_out * W_out, tile["BLOCK_P"]),)
    kernels.filtered[grid](x, y, H, W, H_out, W_out, C, pad, gain, STRIDE=stride, **tile)
    return y


@fused_filter.register_fake
def _empty_filtered(x: Tensor, stride: int, pad: int, gain: float) -> Tensor:
    B, C, H, W = x.shape
    H_out, W_out = ((side + 2 * pad - 4) // stride + 1 for side in (H, W))
    return torch.empty((B, C, H_out, W_out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("ddgan::fir_double", mutates_args=())
def fused_double(x: Tensor, gain: float, more: Tensor | None = None) -> Tensor:
    """`plain_double` in its fused form."""
    from models.fused.kernels import fir as kernels

    x = channels_last(x)
    more = None if more is None else channels_last(more)
    y = _empty_doubled(x, gain, more)
    B, C, H, W = x.shape
    tile, adds = tile_of(C, TILE), more is not None
    grid = (B * ceil_div(4 * H * W, tile["BLOCK_P"]),)
    kernels.doubled[grid](x, x if more is None else more, y, H, W, C, gain, ADDS=adds, **tile)
    return y


@fused_double.register_fake
def _empty_doubled(x: Tensor, gain: float, more: Tensor | None = None) -> Tensor:
    B, C, H, W = x.shape
    return torch.empty((B, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _save_filter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.stride, ctx.pad, ctx.gain = inputs


def _differentiate_filter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.stride == 2:
        return fused_double(grad, ctx.gain), None, None, None
    return fused_filter(grad, 1, 3 - ctx.pad, ctx.gain), None, None, None


def _save_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.gain, more = inputs
    ctx.more_dtype = None if more is None else more.dtype


def _differentiate_double(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_more = None if ctx.more_dtype is None else grad.to(ctx.more_dtype)
    return fused_filter(grad, 2, 1, ctx.gain), None, of_more


fused_filter.register_autograd(_differentiate_filter, setup_context=_save_filter)
fused_double.register_autograd(_differentiate_double, setup_context=_save_double)

fir_filter = Operator("FIR filter", fused_filter, plain_filter)
fir_double = Operator("FIR doubling", fused_double, plain_double)
