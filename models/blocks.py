"""Building blocks of the generator: adaptive group norm, residual block, attention, latent mapping, image pyramids.

Pyramids are side paths that carry the image past the levels of the U-Net (StyleGAN2, 1912.04958, Fig. 7). An input
pyramid follows each `down` block and returns the new features and the new pyramid; an output pyramid sums the image
over the levels.

Shape letters: B batch, C channels, H W height and width, N = H W pixels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import Dropout
from models.fused.fir import fir_double
from models.fused.merge import SQRT_HALF
from models.fused.merge import merge as scaled_sum
from models.fused.operator import can_fuse
from models.layers import NEAR_ZERO, Block, LabelEmbedding, are_whole, group_norm, initialized
from models.resample import FirBlur, FirUpsample, ResampleKind, downsample, upsample
from models.shapes import Embedding, Features, Label, Latent, Style


def merge(a: Features, b: Features, *, rescale: bool) -> Features:
    """Add two branches; `rescale` divides the sum by sqrt 2, which keeps the variance."""
    return scaled_sum(a, b) if rescale else a + b


class LatentMapping(nn.Module):
    """Mapping network: normalizes z to unit mean square and feeds it to a perceptron; adds the label at layer 1."""

    def __init__(self, latent_dim: int, width: int, num_layers: int, num_classes: int = 0) -> None:
        super().__init__()
        widths = [latent_dim, *[width] * num_layers]
        self.layers = nn.ModuleList(initialized(nn.Linear(c, width), fan="out") for c in widths)
        self.label = LabelEmbedding(num_classes, width, deviation=1.0) if num_classes else None

    def silence_latent(self) -> None:
        """Give z no effect at first, for weights that were trained with z = 0; its layer still learns from then on."""
        nn.init.zeros_(self.layers[0].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, z: Latent, label: Label | None = None) -> Style:
        """Map the latent, and the label if there are classes, to the style that modulates every adaptive norm."""
        h = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if i == 0 and self.label is not None:
                h = h + self.label(label)
            h = F.silu(h)
        return h


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in the latent embedding."""

    def __init__(self, num_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm = group_norm(num_channels, affine=False)
        self.style = initialized(nn.Linear(latent_channels, 2 * num_channels), fan="out")
        nn.init.ones_(self.style.bias[:num_channels])

    def forward(
        self, x: Features, zemb: Style, *, silu: bool = False, skip: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize x, then scale and shift it by zemb; see `GroupNorm`."""
        return self.norm(x, self.style(zemb), silu=silu, skip=skip, shift=shift)


class ResidualBlock(Block):
    """BigGAN residual block, conditioned on time and latent; can change the resolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        time_channels: int,
        latent_channels: int,
        dropout: float,
        second_norm_adaptive: bool,
        skip_rescale: bool,
        resample: nn.Module | None = None,
        reshapes: bool = False,
    ) -> None:
        super().__init__()
        self.skip_rescale = skip_rescale
        self.resample = resample
        self.norm1 = AdaptiveGroupNorm(c_in, latent_channels)
        self.conv1 = initialized(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = initialized(nn.Linear(time_channels, c_out))
        self.norm2 = AdaptiveGroupNorm(c_out, latent_channels) if second_norm_adaptive else group_norm(c_out)
        # The only dropout in the networks.
        self.dropout = Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = initialized(nn.Conv2d(c_out, c_out, 3, padding=1), scale=NEAR_ZERO)
        reshapes = reshapes or c_in != c_out or resample is not None
        self.shortcut = initialized(nn.Conv2d(c_in, c_out, 1)) if reshapes else nn.Identity()

    def forward(
        self, x: Features, temb: Embedding, zemb: Style, skip: Float[Tensor, "b c_skip h w"] | None = None
    ) -> tuple[Float[Tensor, "b c_out h_out w_out"], Float[Tensor, "b c_sum h w"]]:
        """Transform features [B, C, H, W], given the activated time embedding and the latent embedding.

        Args:
            x: Features.
            temb: Activated time embedding.
            zemb: Latent embedding.
            skip: More channels of the features.

        Returns:
            The result, and the features as they went in; where they are used again, the norm adds the gradients.
        """
        h, x, same = self.norm1(x, zemb, silu=True, skip=skip)
        if can_fuse(h) and are_whole(self.conv1, self.conv2, self.shortcut):
            return self._fewer_passes(h, x, temb, zemb), same
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.second_half(self.conv1(h), temb, zemb)
        return merge(self.shortcut(x), h, rescale=self.skip_rescale), same

    def second_half(self, h: Features, temb: Embedding, zemb: Style) -> Features:
        """What follows the first convolution: the time, norm, dropout and the second convolution."""
        h = h + self.time(temb)[:, :, None, None]
        return self.conv2(self.dropout(self._second_norm(h, zemb)))

    def _second_norm(self, h: Tensor, zemb: Style, shift: Tensor | None = None) -> Tensor:
        adaptive = (zemb,) if isinstance(self.norm2, AdaptiveGroupNorm) else ()
        return self.norm2(h, *adaptive, silu=True, shift=shift)[0]

    def _fewer_passes(self, h: Tensor, x: Tensor, temb: Embedding, zemb: Style) -> Tensor:
        """What follows the first norm, for a GPU: what passes over features elsewhere is here done to weights.

        The first bias and the time enter with the second norm, the rescaling is a factor of the weights, and the
        shortcut's convolution, which sees single pixels, comes before a doubling.
        """
        h = h if self.resample is None else self.resample(h)
        assert self.conv1.bias is not None and self.conv2.bias is not None
        h = F.conv2d(h, self.conv1.weight, padding=1)
        h = self.dropout(self._second_norm(h, zemb, self.conv1.bias + self.time(temb)))
        if not isinstance(self.shortcut, nn.Conv2d):
            return merge(x, self.conv2(h), rescale=self.skip_rescale)
        factor = SQRT_HALF if self.skip_rescale else 1.0
        assert self.shortcut.bias is not None
        bias = factor * (self.conv2.bias + self.shortcut.bias)
        h = F.conv2d(h, factor * self.conv2.weight, bias, padding=1)
        if isinstance(self.resample, FirUpsample):
            return fir_double(F.conv2d(x, factor * self.shortcut.weight), 4.0, h)
        x = x if self.resample is None else self.resample(x)
        return h + F.conv2d(x, factor * self.shortcut.weight)


class Attention(nn.Module):
    """Single-head self-attention over all pixels.

    The fused kernel has no second derivative. R1 does not need one: the discriminator has no attention.
    """

    def __init__(self, num_channels: int, *, skip_rescale: bool) -> None:
        super().__init__()
        self.skip_rescale = skip_rescale
        self.norm = group_norm(num_channels)
        self.query, self.key, self.value = (
            initialized(nn.Linear(num_channels, num_channels), scale=0.1) for _ in range(3)
        )
        self.out = initialized(nn.Linear(num_channels, num_channels), scale=NEAR_ZERO)

    def forward(self, x: Features) -> Features:
        """Attend from every pixel to every pixel."""
        B, C, H, W = x.shape
        h, x, _ = self.norm(x)
        fewer_passes = can_fuse(h) and are_whole(self.query, self.key, self.value)
        h = h.flatten(2).transpose(1, 2)  # [B, N, C]
        if fewer_passes:
            weight, bias = (
                torch.cat([getattr(layer, name) for layer in (self.query, self.key, self.value)])
                for name in ("weight", "bias")
            )
            query, key, value = F.linear(h, weight, bias)[:, None].chunk(3, dim=3)  # [B, 1, N, C]
        else:
            query, key, value = (project(h)[:, None] for project in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        h = self.out(h).transpose(1, 2).view(B, C, H, W)
        return merge(x, h, rescale=self.skip_rescale)


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
        contribution = self.conv(self.norm(h, silu=True)[0])
        return contribution if image is None else self.upsample(image) + contribution
