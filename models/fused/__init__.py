"""Fused operators for training on a GPU: one pass over memory where plain torch makes several.

Each operator has a plain torch form, which is used on a CPU, in other layouts than channels_last, in float64, inside
torch.compile, and wherever the fused form fails its check. Knows no network.

Files:
    fir         FIR filters with halving or doubling
    kernels/    Triton kernels
    layout      channels_last, and tiles
    leaky       bias and leaky ReLU
    merge       residual merge with its rescaling
    norm        group norm with scale, shift and SiLU
    operator    chooses between the two forms of an operator, and checks the fused one
    traffic     what operators read more than once
    whole_norm  group norm with what surrounds it, for maps that fit on the chip
"""
