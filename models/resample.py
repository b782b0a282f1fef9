"""Halving and doubling the resolution: FIR filters as depthwise convolutions, or mean and nearest neighbour.

The FIR kernel is the outer product of [1, 3, 3, 1] with itself, normalized to sum 1. A depthwise convolution was the
fastest formulation tried (others: separable, polyphase, one-channel, pooling), above all in channels_last. Compiled
networks use sums of shifted pixels instead, and a GPU fused kernels.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.fused.fir import Doubled, Halved, fir_double, fir_filter
from models.fused.operator import can_fuse
from models.shapes import DoubleFeatures, Features, HalfFeatures

ResampleKind = Literal["fir", "nearest", "haar"]
"""`haar` is not a layer, but a kind of block: see `models.haar_blocks`."""


def _kernel(*taps: float) -> Float[Tensor, "k k"]:
    """The outer product of taps with themselves. Computed on the CPU, as in `models.layers.SinusoidalEmbedding`."""
    row = torch.tensor(taps, device="cpu")
    return torch.outer(row, row).to(torch.get_default_device())


class _Fir(nn.Module):
    """Holds the kernel, a constant that is not part of state dicts."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _kernel(0.125, 0.375, 0.375, 0.125), persistent=False)

    def _weight(self, num_channels: int) -> Tensor:
        return self.kernel.expand(num_channels, 1, 4, 4)


class FirDownsample(_Fir):
    """Pad (1, 1), filter, take every second pixel."""

    def forward(self, x: Features) -> HalfFeatures:
        """Halve height and width, which must be even."""
        if torch.compiler.is_compiling():
            return halved_by_slices(x)
        x = _as_autocast(x)
        if can_fuse(x) and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return fir_filter(x, 2, 1, 1.0)
        return Halved.apply(x, self.kernel.to(x.dtype))


class FirUpsample(_Fir):
    """Insert zeros, pad (2, 1), filter with gain 4: exactly a transposed convolution."""

    def forward(self, x: Features) -> DoubleFeatures:
        """Double height and width."""
        if torch.compiler.is_compiling():
            return doubled_by_slices(x)
        x = _as_autocast(x)
        if can_fuse(x):
            return fir_double(x, 4.0)
        return Doubled.apply(x, 4 * self.kernel.to(x.dtype))


def _as_autocast(x: Features) -> Features:
    """x in the dtype that autocast gives to convolutions: inside a function of its own, autograd would not undo it."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def halved_by_slices(x: Features) -> HalfFeatures:
    """`FirDownsample` as sums of shifted pixels, which a compiler can fuse with the operations around them."""
    for dim, padding in ((3, (1, 1)), (2, (0, 0, 1, 1))):
        padded, stop = F.pad(x, padding), x.shape[dim]
        taps = [padded[..., k : k + stop : 2] if dim == 3 else padded[..., k : k + stop : 2, :] for k in range(4)]
        x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
    return x


def doubled_by_slices(x: Features) -> DoubleFeatures:
    """`FirUpsample` as sums of shifted pixels."""
    for dim, padding in ((3, (1, 1)), (2, (0, 0, 1, 1))):
        padded, size = F.pad(x, padding), x.shape[dim]
        before, after = (padded.narrow(dim, start, size) for start in (0, 2))
        x = torch.stack((0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after), dim=dim + 1).flatten(dim, dim + 1)
    return x


class FirBlur(_Fir):
    """Pad (2, 2) and filter; used before a stride-2 convolution without padding."""

    def forward(self, x: Features) -> Float[Tensor, "b c h+1 w+1"]:
        """Filter; height and width grow by one."""
        if can_fuse(x):
            return fir_filter(x, 1, 2, 1.0)
        C = x.shape[1]
        return F.conv2d(x, self._weight(C), padding=2, groups=C)


class BinomialDownsample(nn.Module):
    """Pad (1, 1), filter with the outer product of [1, 2, 1] / 4 with itself, take every second pixel."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _kernel(0.25, 0.5, 0.25, 0.0), persistent=False)  # four taps, for `Halved`

    def forward(self, x: Features) -> HalfFeatures:
        """Halve height and width, which must be even."""
        x = _as_autocast(x)
        return Halved.apply(x, self.kernel.to(x.dtype))


class MeanDownsample(nn.Module):
    """Mean of 2x2 pixels."""

    def forward(self, x: Features) -> HalfFeatures:
        """Halve height and width."""
        return F.avg_pool2d(x, 2)


class NearestUpsample(nn.Module):
    """Every pixel becomes 2x2 pixels."""

    def forward(self, x: Features) -> DoubleFeatures:
        """Double height and width."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(kind: ResampleKind) -> nn.Module:
    """The layer that halves the resolution."""
    return FirDownsample() if kind == "fir" else MeanDownsample()


def upsample(kind: ResampleKind) -> nn.Module:
    """The layer that doubles the resolution."""
    return FirUpsample() if kind == "fir" else NearestUpsample()
