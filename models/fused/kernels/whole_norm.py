"""Group norm of maps whose groups fit on the chip: every tensor is read once, forward and backward.

A program has all pixels of some whole groups of one sample, a slab [pixels, channels]. So the variance is that of the
distances from the mean, in which a large mean cancels nothing, and nothing is left for a second kernel to add.

K is the number of channels of a group and SLAB that of a slab, a multiple of K. The features may come in two parts,
a with C_A channels, then b, and `shift` [B or 1, C] may be added to them before the norm.
"""

from typing import no_type_check

import triton
import triton.language as tl

COUNTS = ["num_pixels"]
"""Arguments whose values must not cause another build."""


@triton.jit
@no_type_check
def _row(ptr, b, stride, channel, real):
    """The numbers of each channel of sample b, in float32."""
    return tl.load(ptr + b.to(tl.int64) * stride + channel, mask=real, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _of_groups(column, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each channel, the sum of `column` over the channels of its group."""
    group = tl.arange(0, BLOCK_C) // K
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, column[None, :], 0.0), axis=1)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def normalized_slabs(
    a_ptr,
    b_ptr,
    shift_ptr,
    style_ptr,
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    shift_stride,
    style_stride,
    num_pixels,
    C_A,
    C,
    eps,
    K: tl.constexpr,
    SLAB: tl.constexpr,
    JOINS: tl.constexpr,
    SHIFTS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = silu((x + shift - mean) rstd s + t), with s and t of the style; x = a, or [a | b], which is then written."""
    program = tl.program_id(0)
    num_slabs = C // SLAB
    b, slab = program // num_slabs, program % num_slabs
    k = tl.arange(0, BLOCK_C)
    real, channel = k < SLAB, slab * SLAB + k
    pixel = tl.arange(0, BLOCK_P)[:, None]
    inside = (pixel < num_pixels) & real[None, :]
    sample = b.to(tl.int64) * num_pixels
    if JOINS:
        first, C_B = (channel < C_A)[None, :], C - C_A
        x = tl.load(a_ptr + sample * C_A + pixel * C_A + channel[None, :], mask=inside & first, other=0.0)
        rest = channel[None, :] - C_A
        other = tl.load(b_ptr + sample * C_B + pixel * C_B + rest, mask=inside & (rest >= 0), other=0.0)
        x = tl.where(first, x, other)
        tl.store(x_ptr + sample * C + pixel * C + channel[None, :], x, mask=inside)
    else:
        x = tl.load(a_ptr + sample * C + pixel * C + channel[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if SHIFTS:
        x = tl.where(inside, x + _row(shift_ptr, b, shift_stride, channel, real)[None, :], 0.0)
    total = num_pixels.to(tl.float32) * K
    mean = _of_groups(tl.sum(x, axis=0), K, BLOCK_C) / total
    distance = tl.where(inside, x - mean[None, :], 0.0)
    variance = _of_groups(tl.sum(distance * distance, axis=0), K, BLOCK_C) / total
    rstd = 1.0 / tl.sqrt(variance + eps)
    group = b * (C // K) + channel // K
    tl.store(mean_ptr + group, mean, mask=real & (k % K == 0))
    tl.store(rstd_ptr + group, rstd, mask=real & (k % K == 0))
    scale = _row(style_ptr, b, style_stride, channel, real)
    y = distance * (rstd * scale)[None, :] + _row(style_ptr + C, b, style_stride, channel, real)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + sample * C + pixel * C + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def slab_gradients(
    x_ptr,
    shift_ptr,
    style_ptr,
    mean_ptr,
    rstd_ptr,
    grad_ptr,
    more_ptr,
    rest_ptr,
    a_ptr,
    b_ptr,
    grad_style_ptr,
    grad_shift_ptr,
    shift_stride,
    style_stride,
    num_pixels,
    C_A,
    C,
    K: tl.constexpr,
    SLAB: tl.constexpr,
    JOINS: tl.constexpr,
    SHIFTS: tl.constexpr,
    NUM_MORE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of a, or of a and b, of the style [B, 2 C] and of the shift [B, C].

    `more` and `rest` are added to the gradient of x, that is of a, or of a and b.
    """
    program = tl.program_id(0)
    num_slabs = C // SLAB
    b, slab = program // num_slabs, program % num_slabs
    k = tl.arange(0, BLOCK_C)
    real, channel = k < SLAB, slab * SLAB + k
    pixel = tl.arange(0, BLOCK_P)[:, None]
    inside = (pixel < num_pixels) & real[None, :]
    sample = b.to(tl.int64) * num_pixels
    offset = sample * C + pixel * C + channel[None, :]
    group = b * (C // K) + channel // K
    mean = tl.load(mean_ptr + group, mask=real, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=real, other=0.0)
    scale = _row(style_ptr, b, style_stride, channel, real)
    if SHIFTS:
        mean -= _row(shift_ptr, b, shift_stride, channel, real)
    x = (tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        u = x * scale[None, :] + _row(style_ptr + C, b, style_stride, channel, real)[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        grad = grad * sigmoid * (1.0 + u * (1.0 - sigmoid))
    of_scale, of_shift = tl.sum(grad * x, axis=0), tl.sum(grad, axis=0)  # grad is 0 outside
    style_out = grad_style_ptr + b.to(tl.int64) * 2 * C + channel
    tl.store(style_out, of_scale, mask=real)
    tl.store(style_out + C, of_shift, mask=real)
    total = num_pixels.to(tl.float32) * K
    level = _of_groups(scale * of_shift, K, BLOCK_C) / total
    slope = _of_groups(scale * of_scale, K, BLOCK_C) / total
    out = rstd[None, :] * (scale[None, :] * grad - level[None, :] - x * slope[None, :])
    if SHIFTS:
        tl.store(grad_shift_ptr + b.to(tl.int64) * C + channel, tl.sum(tl.where(inside, out, 0.0), axis=0), mask=real)
    if NUM_MORE > 0:
        out += tl.load(more_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if NUM_MORE > 1:
        out += tl.load(rest_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = out.to(a_ptr.dtype.element_ty)
    if JOINS:
        C_B = C - C_A
        rest = channel[None, :] - C_A
        tl.store(a_ptr + sample * C_A + pixel * C_A + channel[None, :], out, mask=inside & (channel < C_A)[None, :])
        tl.store(b_ptr + sample * C_B + pixel * C_B + rest, out, mask=inside & (rest >= 0))
    else:
        tl.store(a_ptr + offset, out, mask=inside)
