"""The generator of a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022) as a model of diffusers, for inference.

An NCSN++ U-Net (arXiv 2011.13456) whose group norms are modulated by a latent z, or a perceptron for 2-D points.
`temb` is the embedded time, `zemb` the embedded latent. x_t and the output are [B, C, H, W].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class DDGANGeneratorOutput(BaseOutput):
    """The prediction, [B, C, H, W]: x0_pred, or the noise in x_t."""

    sample: Tensor


class DDGANGenerator(ModelMixin, ConfigMixin):
    """Maps (x_t, t, z) to a prediction.

    Args:
        kind: `unet`, or `mlp` for points.
        image_size: side of the images in pixels.
        sample_size: side of x_t: that of the images, or half of it for wavelet coefficients.
        channels: of x_t.
        num_classes: labels are 0 .. num_classes - 1, and num_classes means none; 0: no labels.
        condition_channels: of the image that is given with x_t, joined to it; 0: none is.
        noise_levels: sigma of the input of each step.
        base_channels, channel_multipliers, num_res_blocks, attention_resolutions: sizes of the network.
        resample: `fir` or `nearest`.
        skip_rescale: divide sums of two branches by the square root of 2.
        block_type: `biggan`, or `biggan_oneadagn`, where z modulates only the first norm of a block.
        progressive_output: `none` or `output_skip`.
        progressive_input: `none`, `input_skip` or `residual`.
        progressive_combine: `sum` or `cat`, of `input_skip`.
        time_embedding: `positional`, `fourier` or `log_sigma`.
        output_tanh: squash the output into [-1, 1].
        sigma_data: mix x_t and output as EDM (arXiv 2206.00364) does.
        latent: whether z is used.
        latent_dim, latent_embedding_dim, num_mapping_layers: sizes of the mapping network.
    """

    levels: Tensor

    @register_to_config
    def __init__(
        self,
        kind: str = "unet",
        image_size: int = 32,
        sample_size: int = 32,
        channels: int = 3,
        num_classes: int = 0,
        condition_channels: int = 0,
        noise_levels: Sequence[float] = (),
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        resample: str = "fir",
        skip_rescale: bool = True,
        block_type: str = "biggan",
        progressive_output: str = "none",
        progressive_input: str = "residual",
        progressive_combine: str = "sum",
        time_embedding: str = "positional",
        output_tanh: bool = True,
        sigma_data: float | None = None,
        latent: bool = True,
        latent_dim: int = 100,
        latent_embedding_dim: int = 256,
        num_mapping_layers: int = 3,
    ) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(noise_levels, dtype=torch.float32), persistent=False)
        self.network = Perceptron(self.config) if kind == "mlp" else UNet(self.config)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        z: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDGANGeneratorOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: x_t, [B, C, H, W].
            timestep: T-1 .. 0; one for all, or int64 [B].
            z: standard normal, [B, latent_dim].
            class_labels: int64 [B]; required if the model has classes.
            condition: what is given, [B, condition_channels, H, W]; required if the model translates.
            return_dict: return an object with `sample` instead of a tuple.
        """
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        seen = self.levels[t] if self.config["time_embedding"] == "log_sigma" else t
        if (condition is None) != (not self.config["condition_channels"]):
            raise ValueError(f"condition must have {self.config['condition_channels']} channels; 0: leave it out")
        x = sample if condition is None else torch.cat([sample, condition], dim=1)
        output = self.network(x, seen, z if self.config["latent"] else torch.zeros_like(z), class_labels)
        prediction = self._meant(output, sample, t)
        return DDGANGeneratorOutput(sample=prediction) if return_dict else (prediction,)

    def _meant(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that the network's output means."""
        sigma_data = self.config["sigma_data"]
        if sigma_data is None:
            return output.tanh() if self.config["output_tanh"] else output
        sigma = self.levels[t].view(-1, 1, 1, 1)
        variance = sigma.square() + sigma_data**2
        x = x_t * (1 + sigma.square()).sqrt()
        return sigma_data**2 / variance * x + sigma * sigma_data / variance.sqrt() * output


class Perceptron(nn.Module):
    """For 2-D points. `config`, here and below, is that of `DDGANGenerator`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        num_values, width = config.channels * config.sample_size**2, config.base_channels
        self.time_embedding = TimeEmbedding(config, width)
        self.mapping = LatentMapping(config)
        self.layer_in = nn.Linear(11 * num_values, width)
        self.time = nn.Linear(width, width)
        self.style = nn.Linear(config.latent_embedding_dim, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_res_blocks))
        self.layer_out = nn.Linear(width, num_values)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, label: Tensor | None) -> Tensor:
        """The output for x_t."""
        x = x_t.flatten(1)
        phases = [math.pi * 2**k * x for k in range(5)]
        waves = torch.cat([x, *(p.sin() for p in phases), *(p.cos() for p in phases)], dim=1)
        time, style = self.time(self.time_embedding(t)), self.style(self.mapping(z, label))
        h = F.silu(self.layer_in(waves) + time + style)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.layer_out(h).view_as(x_t)


class UNet(nn.Module):
    """For images."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        cat = config.progressive_input == "input_skip" and config.progressive_combine == "cat"
        self.time_embedding = TimeEmbedding(config, 4 * config.base_channels)
        self.mapping = LatentMapping(config)
        C, c_pyramid = config.base_channels, config.channels + config.condition_channels
        self.conv_in = nn.Conv2d(c_pyramid, C, 3, padding=1)
        skips = [C]
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(DownLevel(config, i, c_pyramid, C, width, shrinks=i < last))
            skips += [width] * config.num_res_blocks
            C = width
            if i < last:
                c_pyramid = C if config.progressive_input == "residual" else c_pyramid
                C = 2 * C if cat else C
                skips.append(C)
        self.middle_block1 = ResidualBlock(config, C, C)
        self.middle_attention = Attention(config, C)
        self.middle_block2 = ResidualBlock(config, C, C)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            joined = [skips.pop() for _ in range(config.num_res_blocks + 1)]
            self.up.append(UpLevel(config, i, C, width, joined))
            C = width
        self.norm_out = self.conv_out = None
        if config.progressive_output == "none":
            self.norm_out = group_norm(C)
            self.conv_out = nn.Conv2d(C, config.channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, label: Tensor | None) -> Tensor:
        """The output for x_t."""
        temb, zemb = self.time_embedding(t), self.mapping(z, label)
        h = self.conv_in(x_t)
        skips, pyramid, image = [h], x_t, None
        for level in self.down:
            h, pyramid = level(h, pyramid, skips, temb, zemb)
        h = self.middle_block1(h, temb, zemb)
        h = self.middle_attention(h)
        h = self.middle_block2(h, temb, zemb)
        for level in self.up:
            h, image = level(h, image, skips, temb, zemb)
        if self.norm_out is None or self.conv_out is None:
            assert image is not None
            return image
        return self.conv_out(F.silu(self.norm_out(h)))


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then a block that halves it, except at the last level."""

    def __init__(self, config: Any, number: int, c_pyramid: int, C: int, width: int, *, shrinks: bool) -> None:
        super().__init__()
        widths = [C, *[width] * config.num_res_blocks]
        self.blocks = nn.ModuleList(ResidualBlock(config, *pair) for pair in pairwise(widths))
        self.attentions = nn.ModuleList(attention_at(config, number, width) for _ in self.blocks)
        self.downsample = ResidualBlock(config, width, width, Halve(config.resample)) if shrinks else None
        joins = shrinks and config.progressive_input != "none"
        self.pyramid = InputPyramid(config, c_pyramid, width) if joins else None

    def forward(
        self, h: Tensor, pyramid: Tensor, skips: list[Tensor], temb: Tensor, zemb: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features and pyramid for the next level; the features for the way up are added to `skips`."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, temb, zemb))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h, temb, zemb)
            if self.pyramid is not None:
                h, pyramid = self.pyramid(h, pyramid)
            skips.append(h)
        return h, pyramid


class UpLevel(nn.Module):
    """Residual blocks over features and skips, then a block that doubles the resolution, except at the last level."""

    def __init__(self, config: Any, number: int, C: int, width: int, joined: Sequence[int]) -> None:
        super().__init__()
        widths = [C, *[width] * (len(joined) - 1)]
        self.blocks = nn.ModuleList(
            ResidualBlock(config, c + skip, width) for c, skip in zip(widths, joined, strict=True)
        )
        self.attention = attention_at(config, number, width)
        self.to_image = SkipOutput(config, width) if config.progressive_output == "output_skip" else None
        self.upsample = ResidualBlock(config, width, width, Double(config.resample)) if number else None

    def forward(
        self, h: Tensor, image: Tensor | None, skips: list[Tensor], temb: Tensor, zemb: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Features and image for the next level; takes its skips from the end of the list."""
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), temb, zemb)
        h = self.attention(h)
        if self.to_image is not None:
            image = self.to_image(h, image)
        if self.upsample is not None:
            h = self.upsample(h, temb, zemb)
        return h, image


class TimeEmbedding(nn.Module):
    """Two-layer perceptron over an embedding of t, activated."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        kinds = {"positional": SinusoidalEmbedding, "fourier": FourierEmbedding, "log_sigma": NoiseLevelEmbedding}
        self.embedding = kinds[config.time_embedding](config.base_channels)
        self.linear1, self.linear2 = nn.Linear(self.embedding.width, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, width]."""
        embedded = self.embedding(t).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(embedded))))


class SinusoidalEmbedding(nn.Module):
    """[sin | cos] of t at geometrically spaced frequencies."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, half = width, width // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, width]."""
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class NoiseLevelEmbedding(SinusoidalEmbedding):
    """[sin | cos] of 100 ln(sigma)."""

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, width]."""
        return super().forward(100 * t.log())


class FourierEmbedding(nn.Module):
    """[sin | cos] of log(t + 1) at random frequencies, which are part of the weights."""

    frequencies: Tensor

    def __init__(self, num_frequencies: int) -> None:
        super().__init__()
        self.width = 2 * num_frequencies
        self.register_buffer("frequencies", torch.zeros(num_frequencies))

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, width]."""
        phase = 2 * math.pi * torch.log(t[:, None].to(self.frequencies) + 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class LabelEmbedding(nn.Module):
    """A vector for each label, and one for none."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor | None) -> Tensor:
        """[B] to [B, width]."""
        if label is None:
            raise ValueError("this model has classes: give class_labels, num_classes for none")
        return self.embedding(label)


class LatentMapping(nn.Module):
    """Normalizes z and feeds it to a perceptron; the label is added after the first layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.latent_embedding_dim
        widths = [config.latent_dim, *[width] * config.num_mapping_layers]
        self.layers = nn.ModuleList(nn.Linear(c, width) for c in widths)
        self.label = LabelEmbedding(config.num_classes, width) if config.num_classes else None

    def forward(self, z: Tensor, label: Tensor | None) -> Tensor:
        """[B, latent_dim] to [B, width]."""
        h = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if i == 0 and self.label is not None:
                h = h + self.label(label)
            h = F.silu(h)
        return h


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in zemb."""

    def __init__(self, config: Any, num_channels: int) -> None:
        super().__init__()
        self.norm = group_norm(num_channels, affine=False)
        self.style = nn.Linear(config.latent_embedding_dim, 2 * num_channels)

    def forward(self, x: Tensor, zemb: Tensor) -> Tensor:
        """Normalize x, then scale and shift it."""
        scale, shift = self.style(zemb)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, scale, self.norm(x))


class ResidualBlock(nn.Module):
    """BigGAN residual block, conditioned on time and latent; can change the resolution."""

    def __init__(self, config: Any, c_in: int, c_out: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.skip_rescale, self.resample = config.skip_rescale, resample
        self.adaptive = config.block_type == "biggan"
        self.norm1 = AdaptiveGroupNorm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(4 * config.base_channels, c_out)
        self.norm2 = AdaptiveGroupNorm(config, c_out) if self.adaptive else group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        reshapes = c_in != c_out or resample is not None
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if reshapes else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor, zemb: Tensor) -> Tensor:
        """Transform features."""
        h = F.silu(self.norm1(x, zemb))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.time(temb)[:, :, None, None]
        h = F.silu(self.norm2(h, zemb) if self.adaptive else self.norm2(h))
        return merge(self.shortcut(x), self.conv2(h), self.skip_rescale)


class Attention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, config: Any, num_channels: int) -> None:
        super().__init__()
        self.skip_rescale = config.skip_rescale
        self.norm = group_norm(num_channels)
        self.query, self.key, self.value, self.out = (nn.Linear(num_channels, num_channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every pixel to every pixel."""
        h = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (project(h)[:, None] for project in (self.query, self.key, self.value))
        h = self.out(F.scaled_dot_product_attention(query, key, value)[:, 0])
        return merge(x, h.transpose(1, 2).view(x.shape), self.skip_rescale)


class InputPyramid(nn.Module):
    """Halves the image, or what became of it, and joins it to the features of a level."""

    def __init__(self, config: Any, c_pyramid: int, C: int) -> None:
        super().__init__()
        self.skip_rescale = config.skip_rescale
        self.residual, self.cat = config.progressive_input == "residual", config.progressive_combine == "cat"
        if self.residual:
            self.prepare = FirBlur() if config.resample == "fir" else nn.ZeroPad2d((0, 1, 0, 1))
            self.conv = nn.Conv2d(c_pyramid, C, 3, stride=2)
        else:
            self.prepare = Halve(config.resample)
            self.conv = nn.Conv2d(c_pyramid, C, 1)

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """The new features and the new pyramid."""
        pyramid = self.prepare(pyramid)
        image = self.conv(pyramid)
        if self.residual:
            joined = merge(image, h, self.skip_rescale)
            return joined, joined
        return torch.cat([image, h], dim=1) if self.cat else image + h, pyramid


class SkipOutput(nn.Module):
    """Adds a level's contribution to the image."""

    def __init__(self, config: Any, C: int) -> None:
        super().__init__()
        self.norm = group_norm(C)
        self.conv = nn.Conv2d(C, config.channels, 3, padding=1)
        self.upsample = Double(config.resample)

    def forward(self, h: Tensor, image: Tensor | None) -> Tensor:
        """The image so far, with this level."""
        contribution = self.conv(F.silu(self.norm(h)))
        return contribution if image is None else self.upsample(image) + contribution


class Fir(nn.Module):
    """Holds the filter [1, 3, 3, 1] / 8 in two dimensions."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def weight(self, x: Tensor) -> Tensor:
        """For each channel of x, in its dtype."""
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)


class FirBlur(Fir):
    """Filters; height and width grow by one."""

    def forward(self, x: Tensor) -> Tensor:
        """Filter."""
        return F.conv2d(x, self.weight(x), padding=2, groups=x.shape[1])


class Halve(Fir):
    """Halves height and width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Filter and take every second pixel, or take the mean of 2 x 2."""
        if self.kind != "fir":
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight(x), stride=2, padding=1, groups=x.shape[1])


class Double(Fir):
    """Doubles height and width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Filter between zeros, or repeat each pixel."""
        if self.kind != "fir":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv_transpose2d(x, 4 * self.weight(x), stride=2, padding=1, groups=x.shape[1])


def group_norm(num_channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm with min(C // 4, 32) groups."""
    return nn.GroupNorm(min(num_channels // 4, 32), num_channels, eps=1e-6, affine=affine)


def attention_at(config: Any, level: int, num_channels: int) -> nn.Module:
    """Attention, if the config wants it at the resolution of a level."""
    wanted = config.sample_size >> level in config.attention_resolutions
    return Attention(config, num_channels) if wanted else nn.Identity()


def merge(a: Tensor, b: Tensor, rescale: bool) -> Tensor:
    """Add two branches; `rescale` keeps the variance."""
    return (a + b) * math.sqrt(0.5) if rescale else a + b
