"""Blocks that halve and double by the Haar transform, and hand high frequencies past the levels below.

They are WaveDiff's frequency-aware blocks (2211.16152). Features x have the orthonormal coefficients LL, LH, HL and HH.
What is halved goes on with LL / 2, the mean of 2 x 2 pixels; LH, HL and HH, side by side along the channels, are its
bands. The mirrored block makes features of 2 h and of bands.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from models.blocks import ResidualBlock, merge
from models.layers import initialized, join
from models.shapes import DoubleFeatures, Embedding, Features, HalfFeatures, Style
from models.wavelets import from_bands, haar, sums_of_blocks

Bands = Float[Tensor, "b c_bands h//2 w//2"]
GivenBands = Float[Tensor, "b c_bands h w"]


def split(x: Features) -> tuple[HalfFeatures, Bands]:
    """LL / 2 and the bands LH, HL, HH of features, whose sides are even."""
    low, *high = sums_of_blocks(x)
    return low / 4, join(high) / 2


def unsplit(h: Features, bands: GivenBands) -> DoubleFeatures:
    """The features with LL = 2 h and these bands: the inverse of `split`."""
    return from_bands(h, *(bands / 2).chunk(3, dim=1))


class HaarDownBlock(ResidualBlock):
    """Residual block that halves the resolution after its first convolution."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Features, temb: Embedding, zemb: Style
    ) -> tuple[Float[Tensor, "b c_out h//2 w//2"], Features, Bands]:
        """As of `ResidualBlock`; also the bands of what the first convolution made."""
        h, x, same = self.norm1(x, zemb, silu=True)
        h, bands = split(self.conv1(h))
        h = merge(self.shortcut(split(x)[0]), self.second_half(h, temb, zemb), rescale=self.skip_rescale)
        return h, same, bands


class HaarUpBlock(ResidualBlock):
    """Residual block that doubles the resolution of both of its branches, with the same bands.

    Args:
        c_in: channels of the features.
        c_bands: channels of the block whose bands it gets.
        others: as of `ResidualBlock`.
    """

    def __init__(self, c_in: int, c_bands: int, **others: Any) -> None:
        super().__init__(c_in, c_in, reshapes=True, **others)
        self.bands = initialized(nn.Conv2d(3 * c_bands, 3 * c_in, 3, padding=1, groups=3))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Features, temb: Embedding, zemb: Style, bands: GivenBands
    ) -> tuple[DoubleFeatures, Features]:
        """As of `ResidualBlock`, given the bands of the mirrored `HaarDownBlock`."""
        bands = self.bands(bands)
        h, x, same = self.norm1(x, zemb, silu=True)
        h, x = (unsplit(low, bands) for low in (h, x))
        h = merge(self.shortcut(x), self.second_half(self.conv1(h), temb, zemb), rescale=self.skip_rescale)
        return h, same


class HaarMiddleBlock(ResidualBlock):
    """Residual block of LL / 2 alone; the bands stay as they are."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Features, temb: Embedding, zemb: Style
    ) -> tuple[Features, Features]:
        """As of `ResidualBlock`; the sides are even."""
        low, bands = split(x)
        h, _ = ResidualBlock.forward(self, low, temb, zemb)
        return unsplit(h, bands), x


class HaarInput(nn.Module):
    """Halves the pyramid by the Haar transform and a 1 x 1 convolution of all coefficients, and adds the features.

    Takes the place of `models.blocks.ResidualInput`: the sum becomes both of them.
    """

    def __init__(self, c_pyramid: int, c_features: int, *, skip_rescale: bool) -> None:
        super().__init__()
        self.skip_rescale = skip_rescale
        self.conv = initialized(nn.Conv2d(4 * c_pyramid, c_features, 1))

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Join the halved pyramid and the features."""
        joined = merge(self.conv(haar(pyramid)), h, rescale=self.skip_rescale)
        return joined, joined
