"""Group norm with what surrounds it, for maps whose groups fit on the chip: every tensor is read once.

Before the norm, features that come in two parts are joined and a shift is added. Behind it come scale, shift and SiLU.
The operator also returns the features as they went in, twice: for a residual block's shortcut, and for the decoder of a
U-Net. The gradients of these uses are added within the norm's backward pass, which spares a sum of its own for each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from models.fused.layout import channels_last, power_of_two
from models.fused.norm import plain_group_norm
from models.fused.operator import Operator

SLAB_ELEMENTS = 16_384
"""Elements that a program holds: 64 for each of 256 threads forward, twice 32 for each of 512 backward."""
SECTOR_CHANNELS = 16
"""Memory is read by 32 bytes: programs with fewer channels of bfloat16 would read what they do not use."""
MAX_CHANNELS = 64
"""More channels are more programs, unless a group has more."""


def slab_of(num_pixels: int, num_channels: int, num_groups: int) -> int | None:
    """Channels of a program, which are those of whole groups; None if the map is too large for this operator."""
    block_p, K = power_of_two(num_pixels), num_channels // num_groups
    slabs = [count * K for count in range(1, num_groups + 1) if num_groups % count == 0]
    fitting = [slab for slab in slabs if block_p * power_of_two(slab) <= SLAB_ELEMENTS]
    slab = max((slab for slab in fitting if slab <= max(K, MAX_CHANNELS)), default=0)
    return slab if power_of_two(slab) >= min(SECTOR_CHANNELS, num_channels) else None


def plain_norm_of(
    a: Tensor, b: Tensor | None, shift: Tensor | None, style: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain torch."""
    x = a if b is None else torch.cat([a, b], dim=1)
    shifted = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    return plain_group_norm(shifted, style, num_groups, eps, silu), x, x


@torch.library.custom_op("ddgan::whole_norm", mutates_args=())
def _forward(
    a: Tensor, b: Tensor | None, shift: Tensor | None, style: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the joined features (empty if there is no b), and mean and 1 / deviation of each group, float32."""
    from models.fused.kernels import whole_norm as kernels

    a, style = channels_last(a), style.contiguous()
    b, shift = (channels_last(b) if b is not None else None), (shift.contiguous() if shift is not None else None)
    y, x, mean, rstd = _empty(a, b, shift, style, num_groups, eps, silu)
    sizes, programs = _geometry(y, num_groups, 2048)
    kernels.normalized_slabs[(programs,)](
        a,
        a if b is None else b,
        style if shift is None else shift,
        style,
        x,
        y,
        mean,
        rstd,
        0 if shift is None else _stride(shift),
        _stride(style),
        C_A=a.shape[1],
        eps=eps,
        JOINS=b is not None,
        SHIFTS=shift is not None,
        SILU=silu,
        **sizes,
    )
    return y, x, mean, rstd


@_forward.register_fake
def _empty(
    a: Tensor, b: Tensor | None, shift: Tensor | None, style: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (len(a), a.shape[1] + (0 if b is None else b.shape[1]), *a.shape[2:])
    y = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=torch.channels_last)
    x = a.new_empty(0) if b is None else torch.empty_like(y)
    mean, rstd = (a.new_empty(len(a), num_groups, dtype=torch.float32) for _ in range(2))
    return y, x, mean, rstd


@torch.library.custom_op("ddgan::whole_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    more: list[Tensor],
    x: Tensor,
    shift: Tensor | None,
    style: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c_a: int,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b (empty if a has all channels), shift (empty without) and style.

    `grad` is that of the result, `more` has up to two of the features as they went in.
    """
    from models.fused.kernels import whole_norm as kernels

    grad, x, style = channels_last(grad), channels_last(x), style.contiguous()
    more = [channels_last(m) for m in more]
    shift = shift.contiguous() if shift is not None else None
    B, C = x.shape[:2]
    of_a, of_b, *_ = _no_gradients(grad, more, x, shift, style, mean, rstd, c_a, num_groups, silu)
    of_style = x.new_empty(B, 2 * C, dtype=torch.float32)
    of_shift = x.new_empty(0 if shift is None else (B, C), dtype=torch.float32)
    sizes, programs = _geometry(x, num_groups, 1024)
    kernels.slab_gradients[(programs,)](
        x,
        style if shift is None else shift,
        style,
        mean,
        rstd,
        grad,
        more[0] if more else grad,
        more[1] if len(more) > 1 else grad,
        of_a,
        of_b,
        of_style,
        of_shift,
        0 if shift is None else _stride(shift),
        _stride(style),
        C_A=c_a,
        JOINS=c_a < C,
        SHIFTS=shift is not None,
        NUM_MORE=len(more),
        SILU=silu,
        **sizes,
    )
    return of_a, of_b, (of_shift if shift is None else _summed(of_shift, shift)), _summed(of_style, style)


@_backward.register_fake
def _no_gradients(
    grad: Tensor,
    more: list[Tensor],
    x: Tensor,
    shift: Tensor | None,
    style: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c_a: int,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def part(num_channels: int) -> Tensor:
        shape = (len(x), num_channels, *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    of_shift = x.new_empty(0) if shift is None else torch.empty_like(shift)
    return part(c_a), part(x.shape[1] - c_a), of_shift, torch.empty_like(style)


def _geometry(x: Tensor, num_groups: int, warp_elements: int) -> tuple[dict[str, int], int]:
    """Sizes for the kernels, with the warps of a program, each of about `warp_elements`; and the number of programs."""
    B, C, H, W = x.shape
    slab = slab_of(H * W, C, num_groups)
    assert slab is not None
    tile = {"BLOCK_P": power_of_two(H * W), "BLOCK_C": power_of_two(slab)}
    warps = max(1, tile["BLOCK_P"] * tile["BLOCK_C"] // warp_elements)
    sizes = {"num_pixels": H * W, "C": C, "K": C // num_groups, "SLAB": slab, "num_warps": warps, **tile}
    return sizes, B * C // slab


def _stride(row: Tensor) -> int:
    """Distance of the samples' rows; 0 if all samples have the same."""
    return 0 if len(row) == 1 else row.stride(0)


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient that is known for each sample, for a row for each or for all of them."""
    return (grad if len(like) == len(grad) else grad.sum(0, keepdim=True)).to(like.dtype)


class _Norm(Function):
    """The fused form, with one gradient of the features for all of its results."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        shift: Tensor | None,
        style: Tensor,
        num_groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, joined, mean, rstd = _forward(a, b, shift, style, num_groups, eps, silu)
        x = a if b is None else joined
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, shift, style, mean, rstd)
        ctx.c_a, ctx.options = a.shape[1], (num_groups, eps, silu)
        # A second derivative needs what was saved to be an input or a result.
        return y, x.detach() if b is None else x, x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, more = grad_outputs[0], [g for g in grad_outputs[1:] if g is not None]
        x, shift, style, mean, rstd = ctx.saved_tensors
        num_groups, _, silu = ctx.options
        joins = ctx.c_a < x.shape[1]
        if grad is None:
            of_x, of_shift, of_style = sum(more[1:], more[0]), None, None
        elif torch.is_grad_enabled():  # a second derivative is wanted: of the plain form
            y, *_ = plain_norm_of(x, None, shift, style, *ctx.options)
            wanted = [t for t in (x, shift, style) if t is not None]
            of_x, *of_shift, of_style = torch.autograd.grad(y, wanted, grad, create_graph=True)
            of_x = sum(more, of_x)
            of_shift = of_shift[0] if of_shift else None
        else:
            of_a, of_b, of_shift, of_style = _backward(
                grad, more, x, shift, style, mean, rstd, ctx.c_a, num_groups, silu
            )
            return of_a, of_b if joins else None, None if shift is None else of_shift, of_style, None, None, None
        of_b = of_x[:, ctx.c_a :] if joins else None
        return of_x[:, : ctx.c_a], of_b, of_shift, of_style, None, None, None


def fused_norm_of(
    a: Tensor, b: Tensor | None, shift: Tensor | None, style: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in its fused form."""
    return _Norm.apply(a, b, shift, style, num_groups, eps, silu)  # pyright: ignore[reportReturnType]


norm_of = Operator("group norm in one pass", fused_norm_of, plain_norm_of)
