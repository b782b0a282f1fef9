"""Triton kernels over channels_last tensors, seen as pixels [B, H W, C] with the channels next to each other.

Imports nothing but Triton, and is imported when a kernel runs for the first time. No kernel adds floating-point
numbers atomically: sums go into partial results, which a second kernel or torch adds in a fixed order. So the same
input gives the same bits. Every kernel computes in float32, whatever the dtypes of its tensors.

Files:
    elementwise  residual merge, bias and leaky ReLU
    fir          FIR filters
    norm         group norm with SiLU
    whole_norm   group norm of maps that fit on the chip, with what surrounds it
"""
