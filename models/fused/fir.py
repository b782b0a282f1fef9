"""FIR filters with halving or doubling. They are linear, and the gradient of each is another of them.

The taps in each direction are [1, 3, 3, 1] / 8; the sum is multiplied by `gain`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fused.layout import ceil_div, channels_last, tile_of
from models.fused.operator import Operator

TILE = 2048
"""Elements of a tile: every one needs up to 16 products."""


def _weight(x: Tensor, gain: float) -> Tensor:
    k = torch.arange(4, device=x.device, dtype=x.dtype)  # not copied from the host
    taps = (1 + k * (3 - k)) / 8
    return (gain * torch.outer(taps, taps)).expand(x.shape[1], 1, 4, 4)


def plain_filter(x: Tensor, stride: int, pad: int, gain: float) -> Tensor:
    """Pad, filter, take every `stride`-th pixel, in plain torch."""
    return F.conv2d(x, _weight(x, gain), stride=stride, padding=pad, groups=x.shape[1])


def plain_double(x: Tensor, gain: float) -> Tensor:
    """The transpose of `plain_filter` with stride 2 and pad 1, in plain torch."""
    return F.conv_transpose2d(x, _weight(x, gain), stride=2, padding=1, groups=x.shape[1])


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
def fused_double(x: Tensor, gain: float) -> Tensor:
    """`plain_double` in its fused form."""
    from models.fused.kernels import fir as kernels

    x = channels_last(x)
    y = _empty_doubled(x, gain)
    B, C, H, W = x.shape
    tile = tile_of(C, TILE)
    kernels.doubled[(B * ceil_div(4 * H * W, tile["BLOCK_P"]),)](x, y, H, W, C, gain, **tile)
    return y


@fused_double.register_fake
def _empty_doubled(x: Tensor, gain: float) -> Tensor:
    B, C, H, W = x.shape
    return torch.empty((B, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _save_filter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.stride, ctx.pad, ctx.gain = inputs


def _differentiate_filter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.stride == 2:
        return fused_double(grad, ctx.gain), None, None, None
    return fused_filter(grad, 1, 3 - ctx.pad, ctx.gain), None, None, None


def _save_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.gain = inputs


def _differentiate_double(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return fused_filter(grad, 2, 1, ctx.gain), None


fused_filter.register_autograd(_differentiate_filter, setup_context=_save_filter)
fused_double.register_autograd(_differentiate_double, setup_context=_save_double)

fir_filter = Operator("FIR filter", fused_filter, plain_filter)
fir_double = Operator("FIR doubling", fused_double, plain_double)
