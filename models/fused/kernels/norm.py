"""Group norm, scale, shift and SiLU: statistics and result forward; sums and gradient backward.

Tiles are [pixels, channels] of one sample. Its pixels are split over `num_splits` programs of `rows` pixels each. Means
and squared distances are updated and merged by Welford's and Chan's formulas, in which a large mean cancels nothing
(Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979).

K is the number of channels of a group, and `style` [B or 1, 2 C] is scale, then shift. C and K are not compile-time
constants, so one build of a kernel serves all widths of one tile.
"""

from typing import no_type_check

import triton
import triton.language as tl

COUNTS = ["num_pixels", "num_splits", "rows", "K"]
"""Arguments whose values must not cause another build."""


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def partial_moments(
    x_ptr, mean_ptr, square_ptr, num_pixels, num_splits, rows, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and summed squared distance from it, for each channel over one split: two float32 [B, S, C]."""
    program = tl.program_id(0)
    b, s = program // num_splits, program % num_splits
    channel = tl.arange(0, BLOCK_C)[None, :]
    row = tl.arange(0, BLOCK_P)[:, None]
    x_ptr += b.to(tl.int64) * num_pixels * C
    # Each place of the tile has moments of its own, so that nothing is exchanged within the loop.
    means = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    counts = tl.zeros([BLOCK_P, 1], tl.float32)
    stop = tl.minimum((s + 1) * rows, num_pixels)
    for start in range(s * rows, stop, BLOCK_P):
        pixel = start + row
        inside = (pixel < stop) & (channel < C)
        x = tl.load(x_ptr + pixel * C + channel, mask=inside, other=0.0).to(tl.float32)
        counts += (pixel < stop).to(tl.float32)
        delta = tl.where(inside, x - means, 0.0)
        means += delta / tl.maximum(counts, 1.0)
        squares += tl.where(inside, delta * (x - means), 0.0)
    count = tl.sum(counts, axis=0)[:, None]
    # The place with the first pixel has a mean in every channel: distances from it are small.
    first = tl.sum(tl.where(row == 0, means, 0.0), axis=0)[None, :]
    mean = first + tl.sum((means - first) * counts, axis=0)[None, :] / count
    distance = means - mean
    square = tl.sum(squares + distance * distance * counts, axis=0)[None, :]
    out = program.to(tl.int64) * C + channel
    tl.store(mean_ptr + out, mean, mask=channel < C)
    tl.store(square_ptr + out, square, mask=channel < C)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def merged_moments(
    mean_ptr,
    square_ptr,
    group_mean_ptr,
    group_rstd_ptr,
    num_pixels,
    num_splits,
    rows,
    C,
    K,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of each group over all splits: two float32 [B, G]."""
    program = tl.program_id(0)
    num_groups = C // K
    b, g = program // num_groups, program % num_groups
    k = tl.arange(0, BLOCK_K)[None, :]
    base = b.to(tl.int64) * num_splits * C + g * K
    total = num_pixels.to(tl.float32) * K
    first = tl.load(mean_ptr + base)
    weighted = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < num_splits) & (k < K)
        count = tl.minimum(num_pixels - s * rows, rows).to(tl.float32)
        mean = tl.load(mean_ptr + base + s * C + k, mask=inside, other=0.0)
        weighted += tl.where(inside, (mean - first) * count, 0.0)
    group_mean = first + tl.sum(tl.sum(weighted, axis=1), axis=0) / total
    squares = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < num_splits) & (k < K)
        count = tl.minimum(num_pixels - s * rows, rows).to(tl.float32)
        distance = tl.load(mean_ptr + base + s * C + k, mask=inside, other=0.0) - group_mean
        square = tl.load(square_ptr + base + s * C + k, mask=inside, other=0.0)
        squares += tl.where(inside, square + distance * distance * count, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / total
    tl.store(group_mean_ptr + program, group_mean)
    tl.store(group_rstd_ptr + program, 1.0 / tl.sqrt(variance + eps))


@triton.jit
@no_type_check
def _parameters(style_ptr, mean_ptr, rstd_ptr, b, channel, style_stride, C, K):
    """Mean, 1 / deviation, scale and shift of each channel of sample b."""
    real = channel < C
    group = b * (C // K) + channel // K
    style_ptr += b.to(tl.int64) * style_stride + channel
    mean = tl.load(mean_ptr + group, mask=real, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=real, other=0.0)
    scale = tl.load(style_ptr, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(style_ptr + C, mask=real, other=0.0).to(tl.float32)
    return mean, rstd, scale, shift


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def normalized(
    x_ptr,
    style_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    style_stride,
    num_pixels,
    num_splits,
    rows,
    C,
    K,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = silu((x - mean) rstd scale + shift), without the SiLU unless `SILU`."""
    program = tl.program_id(0)
    b, s = program // num_splits, program % num_splits
    channel = tl.arange(0, BLOCK_C)[None, :]
    mean, rstd, scale, shift = _parameters(style_ptr, mean_ptr, rstd_ptr, b, channel, style_stride, C, K)
    sample = b.to(tl.int64) * num_pixels * C
    stop = tl.minimum((s + 1) * rows, num_pixels)
    for start in range(s * rows, stop, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (pixel < stop) & (channel < C)
        offset = sample + (pixel * C + channel)
        y = (tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean) * rstd * scale + shift
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _before_silu(x, grad, scale, shift, SILU: tl.constexpr):
    """The gradient in front of the SiLU, from the one behind it and normalized x."""
    if SILU:
        u = x * scale + shift
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        grad = grad * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return grad


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def partial_sums(
    x_ptr,
    grad_ptr,
    style_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    style_stride,
    num_pixels,
    num_splits,
    rows,
    C,
    K,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of scale and shift over one split: float32 [B, S, 2 C]."""
    program = tl.program_id(0)
    b, s = program // num_splits, program % num_splits
    channel = tl.arange(0, BLOCK_C)[None, :]
    mean, rstd, scale, shift = _parameters(style_ptr, mean_ptr, rstd_ptr, b, channel, style_stride, C, K)
    sample = b.to(tl.int64) * num_pixels * C
    of_scale = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    of_shift = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    stop = tl.minimum((s + 1) * rows, num_pixels)
    for start in range(s * rows, stop, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (pixel < stop) & (channel < C)
        offset = sample + (pixel * C + channel)
        x = (tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad = _before_silu(x, grad, scale, shift, SILU)  # 0 outside
        of_scale += tl.where(inside, grad * x, 0.0)
        of_shift += tl.where(inside, grad, 0.0)
    out = sums_ptr + program.to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(of_scale, axis=0)[None, :], mask=channel < C)
    tl.store(out + C, tl.sum(of_shift, axis=0)[None, :], mask=channel < C)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def merged_sums(
    sums_ptr,
    style_ptr,
    grad_style_ptr,
    group_sums_ptr,
    style_stride,
    num_splits,
    C,
    K,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The style's gradient [B, 2 C], and each group's sums of scale times gradient and of that times x: [B, G, 2]."""
    program = tl.program_id(0)
    num_groups = C // K
    b, g = program // num_groups, program % num_groups
    k = tl.arange(0, BLOCK_K)[None, :]
    channel = g * K + k
    of_scale = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    of_shift = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    sums_ptr += b.to(tl.int64) * num_splits * 2 * C + channel
    for start in range(0, num_splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < num_splits) & (k < K)
        of_scale += tl.load(sums_ptr + s * 2 * C, mask=inside, other=0.0)
        of_shift += tl.load(sums_ptr + s * 2 * C + C, mask=inside, other=0.0)
    scale_sum = tl.sum(of_scale, axis=0)[None, :]
    shift_sum = tl.sum(of_shift, axis=0)[None, :]
    out = grad_style_ptr + b.to(tl.int64) * 2 * C + channel
    tl.store(out, scale_sum, mask=k < K)
    tl.store(out + C, shift_sum, mask=k < K)
    scale = tl.load(style_ptr + b.to(tl.int64) * style_stride + channel, mask=k < K, other=0.0).to(tl.float32)
    tl.store(group_sums_ptr + 2 * program, tl.sum(tl.sum(scale * shift_sum, axis=1), axis=0))
    tl.store(group_sums_ptr + 2 * program + 1, tl.sum(tl.sum(scale * scale_sum, axis=1), axis=0))


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def gradient(
    x_ptr,
    grad_ptr,
    style_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,
    out_ptr,
    style_stride,
    num_pixels,
    num_splits,
    rows,
    C,
    K,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of x: rstd (h - mean(h) - x mean(h x)), with h = scale grad, x normalized and means over the group."""
    program = tl.program_id(0)
    b, s = program // num_splits, program % num_splits
    channel = tl.arange(0, BLOCK_C)[None, :]
    mean, rstd, scale, shift = _parameters(style_ptr, mean_ptr, rstd_ptr, b, channel, style_stride, C, K)
    group = b * (C // K) + channel // K
    total = num_pixels.to(tl.float32) * K
    level = tl.load(group_sums_ptr + 2 * group, mask=channel < C, other=0.0) / total
    slope = tl.load(group_sums_ptr + 2 * group + 1, mask=channel < C, other=0.0) / total
    sample = b.to(tl.int64) * num_pixels * C
    stop = tl.minimum((s + 1) * rows, num_pixels)
    for start in range(s * rows, stop, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (pixel < stop) & (channel < C)
        offset = sample + (pixel * C + channel)
        x = (tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        out = rstd * (scale * _before_silu(x, grad, scale, shift, SILU) - level - x * slope)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)
