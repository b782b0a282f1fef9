"""FIR filters with the taps [1, 3, 3, 1] / 8 in both directions, combined with halving or doubling.

A program computes a tile [pixels of the result, channels] of one sample. Neighbouring pixels of the input are read
several times, but from the cache.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tap(k):
    """1/8, 3/8, 3/8, 1/8 for k = 0, 1, 2, 3."""
    return 0.125 + 0.125 * (k * (3 - k))


@triton.jit(do_not_specialize=["H", "W", "H_out", "W_out", "pad"])
@no_type_check
def filtered(
    x_ptr,
    y_ptr,
    H,
    W,
    H_out,
    W_out,
    C,
    pad,
    gain,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[i, j] = gain sum_ab tap[a] tap[b] x[STRIDE i - pad + a, STRIDE j - pad + b], with zeros outside of x."""
    num_pixels = H_out * W_out
    num_blocks = tl.cdiv(num_pixels, BLOCK_P)
    program = tl.program_id(0)
    b, block = program // num_blocks, program % num_blocks
    channel = tl.arange(0, BLOCK_C)[None, :]
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    inside = (pixel < num_pixels) & (channel < C)
    row, column = pixel // W_out * STRIDE - pad, pixel % W_out * STRIDE - pad
    x_ptr += b.to(tl.int64) * H * W * C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for a in tl.static_range(4):
        for k in tl.static_range(4):
            i, j = row + a, column + k
            there = inside & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            x = tl.load(x_ptr + (i * W + j) * C + channel, mask=there, other=0.0).to(tl.float32)
            total += x * (_tap(a) * _tap(k))
    out = b.to(tl.int64) * num_pixels * C + (pixel * C + channel)
    tl.store(y_ptr + out, (total * gain).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "W"])
@no_type_check
def doubled(x_ptr, more_ptr, y_ptr, H, W, C, gain, ADDS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The transpose of `filtered` with STRIDE 2 and pad 1, and the sum of it and `more`.

    y[i, j] gathers the 2 x 2 pixels of x that it reaches.
    """
    W_out = 2 * W
    num_pixels = 2 * H * W_out
    num_blocks = tl.cdiv(num_pixels, BLOCK_P)
    program = tl.program_id(0)
    b, block = program // num_blocks, program % num_blocks
    channel = tl.arange(0, BLOCK_C)[None, :]
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    inside = (pixel < num_pixels) & (channel < C)
    row, column = pixel // W_out, pixel % W_out
    x_ptr += b.to(tl.int64) * H * W * C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(2):
        for n in tl.static_range(2):
            i, j = (row + 1) // 2 - m, (column + 1) // 2 - n
            there = inside & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            x = tl.load(x_ptr + (i * W + j) * C + channel, mask=there, other=0.0).to(tl.float32)
            total += x * (_tap((row + 1) % 2 + 2 * m) * _tap((column + 1) % 2 + 2 * n))
    out = b.to(tl.int64) * num_pixels * C + (pixel * C + channel)
    total *= gain
    if ADDS:
        total += tl.load(more_ptr + out, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=inside)
