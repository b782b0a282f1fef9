"""Image pyramids: side paths of the generator that carry the image past its levels (StyleGAN2, 1912.04958, Fig. 7).

An input pyramid follows each `down` block and returns the new features and the new pyramid. An output pyramid sums the
image over the levels.
"""

import torch
from torch import Tensor, nn

from models.blocks import merge
from models.layers import NEAR_ZERO, group_norm, initialized
from models.resample import FirBlur, ResampleKind, downsample, upsample


class ResidualInput(nn.Module):
    """Halves the pyramid by a strided convolution and adds it to the features; the sum becomes both of them."""

    def __init__(self, c_pyramid: int, c_features: int, *, resample: ResampleKind, skip_rescale: bool) -> None:
        super().__init__()
        self.skip_rescale = skip_rescale
        # Without FIR, pad the right and bottom edges with zeros so that the convolution covers every pixel.
        self.prepare = FirBlur() if resample == "fir" else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = initialized(nn.Conv2d(c_pyramid, c_features, 3, stride=2))

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Join the halved pyramid and the features."""
        joined = merge(self.conv(self.prepare(pyramid)), h, rescale=self.skip_rescale)
        return joined, joined


class SkipInput(nn.Module):
    """Halves the image and joins it, after a 1x1 convolution, to the features."""

    def __init__(self, image_channels: int, c_features: int, *, resample: ResampleKind, concatenates: bool) -> None:
        super().__init__()
        self.concatenates = concatenates
        self.downsample = downsample(resample)
        self.conv = initialized(nn.Conv2d(image_channels, c_features, 1))

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Join the halved image and the features by a plain sum, or by concatenation (twice as many channels)."""
        pyramid = self.downsample(pyramid)
        image = self.conv(pyramid)
        return torch.cat([image, h], dim=1) if self.concatenates else image + h, pyramid


class NoInput(nn.Module):
    """No input pyramid."""

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Return both unchanged."""
        return h, pyramid


class SkipOutput(nn.Module):
    """Adds a level's contribution to the upsampled sum of the levels below."""

    def __init__(self, c_features: int, image_channels: int, *, resample: ResampleKind) -> None:
        super().__init__()
        self.norm = group_norm(c_features)
        self.conv = initialized(nn.Conv2d(c_features, image_channels, 3, padding=1), scale=NEAR_ZERO)
        self.upsample = upsample(resample)

    def forward(self, h: Tensor, image: Tensor | None) -> Tensor:
        """Add this level to the image so far."""
        contribution = self.conv(self.norm(h, silu=True))
        return contribution if image is None else self.upsample(image) + contribution
