"""Group norm with scale and shift per sample, and SiLU.

The forward pass reads x twice, for the statistics and for the result. The backward pass recomputes what it needs from x
and the statistics, which are in float32. `style` [B, 2 C] is scale, then shift, or [1, 2 C] for all samples.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fused.layout import TILE, ceil_div, channels_last, power_of_two, tile_of
from models.fused.operator import Operator
from models.fused.traffic import READ_AGAIN

ELEMENTS = 8 * TILE
"""Elements of a program. Large maps are split over so many programs that each GPU has enough of them."""


def plain_group_norm(x: Tensor, style: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    """The operator in plain torch."""
    scale, shift = style[:, :, None, None].chunk(2, dim=1)
    h = torch.addcmul(shift, scale, F.group_norm(x, num_groups, eps=eps))
    return F.silu(h) if silu else h


@torch.library.custom_op("ddgan::group_norm", mutates_args=())
def _forward(x: Tensor, style: Tensor, num_groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / deviation of each group [B, G], float32."""
    from models.fused.kernels import norm as kernels

    x, style = channels_last(x), style.contiguous()
    y, mean, rstd = _empty(x, style, num_groups, eps, silu)
    sizes, tile, small = _geometry(x, num_groups)
    programs = len(x) * sizes["num_splits"]
    means, squares = x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
    K = x.shape[1] // num_groups
    kernels.partial_moments[(programs,)](x, means, squares, **sizes, **tile)
    kernels.merged_moments[(mean.numel(),)](means, squares, mean, rstd, **sizes, K=K, eps=eps, **small)
    stride = 0 if len(style) == 1 else style.stride(0)
    kernels.normalized[(programs,)](x, style, mean, rstd, y, stride, **sizes, K=K, SILU=silu, **tile)
    return y, mean, rstd


@_forward.register_fake
def _empty(x: Tensor, style: Tensor, num_groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty(len(x), num_groups, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op("ddgan::group_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, style: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and style."""
    from models.fused.kernels import norm as kernels

    grad, x, style = channels_last(grad), channels_last(x), style.contiguous()
    sizes, tile, small = _geometry(x, num_groups)
    B, C, K = len(x), x.shape[1], x.shape[1] // num_groups
    programs = B * sizes["num_splits"]
    sums = x.new_empty(programs, 2 * C, dtype=torch.float32)
    group_sums = x.new_empty(B, num_groups, 2, dtype=torch.float32)
    grad_style = x.new_empty(B, 2 * C, dtype=torch.float32)
    grad_x = torch.empty_like(x)
    stride = 0 if len(style) == 1 else style.stride(0)
    kernels.partial_sums[(programs,)](x, grad, style, mean, rstd, sums, stride, **sizes, K=K, SILU=silu, **tile)
    kernels.merged_sums[(B * num_groups,)](
        sums, style, grad_style, group_sums, stride, sizes["num_splits"], C, K, **small
    )
    kernels.gradient[(programs,)](
        x, grad, style, mean, rstd, group_sums, grad_x, stride, **sizes, K=K, SILU=silu, **tile
    )
    return grad_x, (grad_style if len(style) == B else grad_style.sum(0, keepdim=True)).to(style.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, style: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(style)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, style, ctx.num_groups, ctx.eps, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, style, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, style, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: of the plain form
        y = plain_group_norm(x, style, ctx.num_groups, ctx.eps, ctx.silu)
        return *torch.autograd.grad(y, (x, style), grad, create_graph=True), None, None, None
    return *_backward(grad, x, style, mean, rstd, ctx.num_groups, ctx.silu), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
# Statistics or sums first, then the result; what the kernels hand to each other is far smaller.
READ_AGAIN[torch.ops.ddgan.group_norm] = lambda x, *_: x.nbytes
READ_AGAIN[torch.ops.ddgan.group_norm_backward] = lambda grad, x, *_: grad.nbytes + x.nbytes


def _geometry(x: Tensor, num_groups: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sizes for the kernels, the tile of pixels and channels, and the tile of splits and channels of a group."""
    _, C, H, W = x.shape
    tile, block_k = tile_of(C, TILE), power_of_two(C // num_groups)
    rows = max(tile["BLOCK_P"], ELEMENTS // tile["BLOCK_C"])
    sizes = {"num_pixels": H * W, "num_splits": ceil_div(H * W, rows), "rows": rows, "C": C}
    return sizes, tile, {"BLOCK_S": max(1, 512 // block_k), "BLOCK_K": block_k}


def fused_group_norm(x: Tensor, style: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    """The operator in its fused form."""
    return _forward(x, style, num_groups, eps, silu)[0]


group_norm = Operator("group norm", fused_group_norm, plain_group_norm)
