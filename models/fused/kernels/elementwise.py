"""Residual merge, and bias with leaky ReLU, over flat tensors."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def scaled_sum(a_ptr, b_ptr, out_ptr, numel, scale, BLOCK: tl.constexpr):
    """out = (a + b) scale."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    a = tl.load(a_ptr + offset, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + offset, mask=inside).to(tl.float32)
    tl.store(out_ptr + offset, ((a + b) * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_pixels"])
@no_type_check
def leaky_relu(
    x_ptr,
    bias_ptr,
    y_ptr,
    bias_stride,
    num_pixels,
    C,
    slope,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x + bias where that is positive, otherwise slope (x + bias); the bias is [B or 1, C]."""
    num_blocks = tl.cdiv(num_pixels, BLOCK_P)
    program = tl.program_id(0)
    b, block = program // num_blocks, program % num_blocks
    channel = tl.arange(0, BLOCK_C)[None, :]
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    inside = (pixel < num_pixels) & (channel < C)
    bias = tl.load(bias_ptr + b.to(tl.int64) * bias_stride + channel, mask=channel < C, other=0.0).to(tl.float32)
    offset = b.to(tl.int64) * num_pixels * C + (pixel * C + channel)
    h = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias
    y = tl.where(h > 0, h, slope * h)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def leaky_relu_gradient(grad_ptr, y_ptr, out_ptr, numel, slope, BLOCK: tl.constexpr):
    """out = grad where y is positive, otherwise slope grad."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    grad = tl.load(grad_ptr + offset, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=inside).to(tl.float32)
    tl.store(out_ptr + offset, tl.where(y > 0, grad, slope * grad).to(out_ptr.dtype.element_ty), mask=inside)
