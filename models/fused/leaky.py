"""Bias and leaky ReLU in one pass. The backward pass needs only the result, and can be differentiated again."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fused.layout import TILE, ceil_div, channels_last, tile_of
from models.fused.operator import Operator

BLOCK = 4096
"""Elements that a program of the backward pass takes."""


def plain_leaky_relu(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    """The operator in plain torch; the bias [B, C] differs by sample, [1, C] does not."""
    return F.leaky_relu(x + bias.to(x.dtype)[:, :, None, None], slope)


@torch.library.custom_op("ddgan::leaky_relu", mutates_args=())
def fused_leaky_relu(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    """The operator in its fused form."""
    from models.fused.kernels import elementwise as kernels

    x, bias = channels_last(x), bias.contiguous()
    y = torch.empty_like(x)
    B, C, H, W = x.shape
    tile = tile_of(C, TILE)
    stride = 0 if len(bias) == 1 else bias.stride(0)
    kernels.leaky_relu[(B * ceil_div(H * W, tile["BLOCK_P"]),)](x, bias, y, stride, H * W, C, slope, **tile)
    return y


@fused_leaky_relu.register_fake
def _(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("ddgan::leaky_relu_backward", mutates_args=())
def _backward(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    """The gradient before the leaky ReLU, from the one behind it and the result."""
    from models.fused.kernels import elementwise as kernels

    grad, y = channels_last(grad), channels_last(y)
    out = torch.empty_like(grad)
    kernels.leaky_relu_gradient[(ceil_div(y.numel(), BLOCK),)](grad, y, out, y.numel(), slope, BLOCK=BLOCK)
    return out


@_backward.register_fake
def _(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, ctx.slope = inputs
    ctx.num_biases, ctx.bias_dtype = len(bias), bias.dtype
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    before = _backward(grad, y, ctx.slope)
    if not ctx.needs_input_grad[1]:
        return before, None, None
    of_bias = before.sum((2, 3) if ctx.num_biases == len(y) else (0, 2, 3), dtype=torch.float32)
    return before, of_bias.to(ctx.bias_dtype).view(ctx.num_biases, -1), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, ctx.slope = inputs
    ctx.save_for_backward(y)


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The slope is constant on both sides of 0, so the result passes no gradient to y.
    return _backward(grad, *ctx.saved_tensors, ctx.slope), None, None


fused_leaky_relu.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)

leaky_relu = Operator("leaky ReLU", fused_leaky_relu, plain_leaky_relu)
