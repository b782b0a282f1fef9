"""The generator: an NCSN++ U-Net (arXiv 2011.13456) with adaptive group norm, as in DDGAN (arXiv 2112.07804).

It maps a noisy image, its step and a latent to a prediction of the clean image. Build it under `torch.device("meta")`
to check a config without spending memory or time.

Shape letters: B batch, C channels, H W height and width. `temb` [B, 4 x base_channels] is the embedded time and `zemb`
[B, latent_embedding_dim] the embedded latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.blocks import Attention, LatentMapping, NoInput, ResidualBlock, ResidualInput, SkipInput, SkipOutput
from models.dropout import DropProbability
from models.haar_blocks import HaarDownBlock, HaarInput, HaarMiddleBlock, HaarUpBlock
from models.layers import (
    NEAR_ZERO,
    FourierEmbedding,
    NoiseLevelEmbedding,
    SinusoidalEmbedding,
    TimeEmbedding,
    group_norm,
    initialized,
    join,
)
from models.noise_levels import NoiseConditioning
from models.resample import ResampleKind, downsample, upsample
from models.shapes import Condition, Embedding, Features, Image, ImageForm, Label, Latent, NoiseLevel, Style, Timestep


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator. Image size and channels come from the data."""

    kind: Literal["unet", "mlp"] = "unet"
    """`mlp` treats an image as a vector, for 2-D points: 1 + num_res_blocks hidden layers of width base_channels. It
    reads only the settings of the latent, of the noise level and of the output in addition."""
    base_channels: Annotated[int, Field(gt=0, le=16_384, description="wider networks fit no device")] = 128
    """Channels of the first level: a multiple of 4, and from 128 on a multiple of 32."""
    channel_multipliers: Annotated[
        tuple[Annotated[int, Field(gt=0, le=64, description="wider networks fit no device")], ...],
        Field(min_length=1, max_length=16),
    ] = (1, 2, 2, 2)
    """Width of each level of the U-Net in units of base_channels. Each level has half the resolution of the one
    before."""
    num_res_blocks: Annotated[int, Field(gt=0, le=32, description="published networks have up to 8")] = 2
    """Residual blocks of each level on the way down. On the way up each level has one more."""
    attention_resolutions: Annotated[tuple[PositiveInt, ...], Field(max_length=16)] = (16,)
    """Levels with self-attention, by the height of their feature maps in pixels. The middle of the U-Net always has
    it."""
    dropout: DropProbability = 0.0
    """Probability of dropping a feature before the second convolution of a block, in training only."""
    resample: ResampleKind = "fir"
    """How the resolution is halved and doubled: with a smoothing filter (`fir`), by averaging and repeating pixels
    (`nearest`), or by the Haar transform of features (`haar`), whose high frequencies go past the levels below, as in
    WaveDiff, meant for data.domain haar. `haar` needs an even side at the last level, no progressive_output, and no
    progressive_input other than residual."""
    skip_rescale: bool = True
    """Divide the sum of two branches by the square root of 2, which keeps its variance."""
    block_type: Literal["biggan", "biggan_oneadagn"] = "biggan"
    """With `biggan_oneadagn`, the latent modulates only the first of a block's two norms."""
    progressive_output: Literal["none", "output_skip"] = "none"
    """`output_skip` sums an image over all levels instead of making it at the last level."""
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    """How the downsampled image enters the lower levels: not at all, through 1x1 convolutions (`input_skip`),
    or through a chain of strided convolutions (`residual`)."""
    progressive_combine: Literal["sum", "cat"] = "sum"
    """How `input_skip` joins image and features: their sum, or both side by side (`cat`), which doubles the width."""
    time_embedding: Literal["positional", "fourier", "log_sigma"] = "positional"
    """How the generator sees the step: sines of t at fixed frequencies (`positional`), of log(t + 1) at random ones
    (`fourier`), or of the logarithm of the noise level (`log_sigma`). With `log_sigma` the same weights serve any
    number of steps."""
    fourier_scale: Annotated[float, Field(gt=0, le=1e6, description="above, float32 cannot tell two steps apart")] = (
        16.0
    )
    """Standard deviation of the random frequencies of `fourier`."""
    output_tanh: bool = True
    """Squash the output into [-1, 1], the range of pixels, by tanh."""
    sigma_data: PositiveFloat | None = None
    """Standard deviation of the data, about 0.5 for images: x0_pred is then the noisy image and the network's output,
    weighted by the noise level as in EDM (2206.00364), and output_tanh must be false. null: the output alone."""
    latent: bool = True
    """Feed z to the generator. false: it gets zeros instead, so that x0_pred depends on x_t and t only, an ablation of
    the paper."""
    latent_dim: Annotated[int, Field(gt=0, le=65_536, description="wider networks fit no device")] = 100
    """Length of the latent z."""
    latent_embedding_dim: Annotated[int, Field(gt=0, le=65_536, description="wider networks fit no device")] = 256
    """Width of the mapping network, whose output modulates the adaptive norms."""
    num_mapping_layers: Annotated[int, Field(gt=0, le=128, description="deeper networks do not train")] = 3
    """Layers of the mapping network in addition to its first."""


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then a block that halves it; `downsample` is None at the last level."""

    def __init__(
        self, blocks: nn.ModuleList, attentions: nn.ModuleList, downsample: ResidualBlock | None, pyramid: nn.Module
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.attentions = attentions
        self.downsample = downsample
        self.pyramid = pyramid

    def forward(
        self, h: Features, pyramid: Tensor, temb: Embedding, zemb: Style
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """Return features and input pyramid for the next level, and skip features and bands for the decoder.

        The skip features are what went into each block.
        """
        skips: list[Tensor] = []
        bands = None
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h, skip = block(h, temb, zemb)
            h = attention(h)
            skips.append(skip)
        if self.downsample is not None:
            h, skip, *split_off = self.downsample(h, temb, zemb)
            bands = split_off[0] if split_off else None
            h, pyramid = self.pyramid(h, pyramid)
            skips.append(skip)
        return h, pyramid, tuple(skips), bands


class UpLevel(nn.Module):
    """Residual blocks over features and skips, then a block that doubles the resolution, None at the last level."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        attention: nn.Module,
        to_image: SkipOutput | None,
        upsample: ResidualBlock | None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.attention = attention
        self.to_image = to_image
        self.upsample = upsample

    def forward(
        self,
        h: Features,
        image: Tensor | None,
        skips: tuple[Tensor, ...],
        temb: Embedding,
        zemb: Style,
        bands: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return features and output image for the next level.

        `skips` holds one tensor per block, and `bands` what the mirrored level has split off, if it has.
        """
        for block, skip in zip(self.blocks, skips, strict=True):
            h, _ = block(h, temb, zemb, skip)
        h = self.attention(h)
        if self.to_image is not None:
            image = self.to_image(h, image)
        if self.upsample is not None:
            h, _ = self.upsample(h, temb, zemb, *([] if bands is None else [bands]))
        return h, image


class Generator(nn.Module):
    """x0_pred = G(x_t, t, z).

    Args:
        config: Architecture.
        form: Size, channels and classes of the images.
        noise_levels: sigma of the input of each step, 0 .. T-1; for networks that see the noise level.

    Raises:
        ValueError: The image size does not fit the config, or a width cannot be split for group norm.
    """

    def __init__(self, config: GeneratorConfig, form: ImageForm, noise_levels: Sequence[float] = ()) -> None:
        super().__init__()
        self.noise = noise_conditioning(config, noise_levels)
        resolutions = _level_resolutions(config, form.size)
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.config = config

        time_channels = 4 * config.base_channels
        options: dict[str, Any] = {
            "time_channels": time_channels,
            "latent_channels": config.latent_embedding_dim,
            "dropout": config.dropout,
            "second_norm_adaptive": config.block_type == "biggan",
            "skip_rescale": config.skip_rescale,
        }
        block = partial(ResidualBlock, **options)
        by_haar = config.resample == "haar"

        def attention(C: int, resolution: int) -> nn.Module:
            wanted = resolution in config.attention_resolutions
            return Attention(C, skip_rescale=config.skip_rescale) if wanted else nn.Identity()

        self.time_embedding = TimeEmbedding(_step_embedding(config), time_channels, nn.SiLU(), fan="average")
        self.mapping = LatentMapping(
            config.latent_dim, config.latent_embedding_dim, config.num_mapping_layers, form.num_classes
        )

        C = config.base_channels
        c_pyramid = form.channels + form.condition_channels
        self.conv_in = initialized(nn.Conv2d(c_pyramid, C, 3, padding=1))
        skip_channels = [C]
        self.down = nn.ModuleList()
        for i, (width, resolution) in enumerate(zip(widths, resolutions, strict=True)):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks):
                blocks.append(block(C, width))
                attentions.append(attention(width, resolution))
                C = width
                skip_channels.append(C)
            shrink, pyramid = None, NoInput()
            if i < last:
                if by_haar:
                    shrink = HaarDownBlock(C, C, reshapes=True, **options)
                else:
                    shrink = block(C, C, resample=downsample(config.resample))
                pyramid, C, c_pyramid = _input_pyramid(config, c_pyramid, C)
                skip_channels.append(C)
            self.down.append(DownLevel(blocks, attentions, shrink, pyramid))

        middle = partial(HaarMiddleBlock, **options) if by_haar else block
        self.middle_block1 = middle(C, C)
        self.middle_attention = Attention(C, skip_rescale=config.skip_rescale)
        self.middle_block2 = middle(C, C)

        self.up = nn.ModuleList()
        for i, (width, resolution) in reversed(list(enumerate(zip(widths, resolutions, strict=True)))):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(block(C + skip_channels.pop(), width))
                C = width
            outputs = config.progressive_output == "output_skip"
            to_image = SkipOutput(C, form.channels, resample=config.resample) if outputs else None
            grow = None
            if i > 0:
                if by_haar:
                    grow = HaarUpBlock(C, widths[i - 1], **options)
                else:
                    grow = block(C, C, resample=upsample(config.resample))
            self.up.append(UpLevel(blocks, attention(C, resolution), to_image, grow))
        assert not skip_channels

        if config.progressive_output == "none":
            self.norm_out = group_norm(C)
            self.conv_out = initialized(nn.Conv2d(C, form.channels, 3, padding=1), scale=NEAR_ZERO)

    def forward(
        self,
        x_t: Image,
        t: Timestep | NoiseLevel,
        z: Latent,
        label: Label | None = None,
        condition: Condition | None = None,
    ) -> Image:
        """Predict x0.

        Args:
            x_t: Noisy image, of the size and channels given at construction.
            t: Step index, 0 .. T-1; with time_embedding log_sigma, a float is the noise level itself.
            z: Standard normal latent.
            label: 0 .. num_classes - 1, or num_classes for no label. Required if the network has classes.
            condition: Image that is given, joined to x_t. Required if the network was built with its channels.

        Returns:
            x0_pred, in [-1, 1] with `output_tanh`.
        """
        temb = self.time_embedding(self.noise.seen(t))
        zemb = self.mapping(z if self.config.latent else torch.zeros_like(z), label)
        seen = x_t if condition is None else join([x_t, condition])
        h = self.conv_in(seen)
        # Levels return their skips: ZeRO-3's hooks pass copies of lists to a module, so appending to one has no effect.
        skips, pyramid, image = [], seen, None
        all_bands: list[Tensor | None] = []
        for level in self.down:
            h, pyramid, more, bands = level(h, pyramid, temb, zemb)
            skips += more
            all_bands.append(bands)
        all_bands.pop()  # the last level does not halve
        h, skip = self.middle_block1(h, temb, zemb)
        skips.append(skip)
        h, _ = self.middle_block2(self.middle_attention(h), temb, zemb)
        for level in cast("list[UpLevel]", list(self.up)):
            bands = all_bands.pop() if all_bands else None
            h, image = level(h, image, tuple(skips.pop() for _ in level.blocks), temb, zemb, bands)
        output = self.conv_out(self.norm_out(h, silu=True)[0]) if image is None else image
        return self.noise.x0_pred(output, x_t, t)


def noise_conditioning(config: GeneratorConfig, noise_levels: Sequence[float]) -> NoiseConditioning:
    """How a generator of this config sees the noise level, and what its output means."""
    embedded = config.time_embedding == "log_sigma"
    return NoiseConditioning(noise_levels, embedded=embedded, sigma_data=config.sigma_data, tanh=config.output_tanh)


def _step_embedding(config: GeneratorConfig) -> SinusoidalEmbedding | FourierEmbedding:
    if config.time_embedding == "fourier":
        return FourierEmbedding(config.base_channels, config.fourier_scale)
    kind = NoiseLevelEmbedding if config.time_embedding == "log_sigma" else SinusoidalEmbedding
    return kind(config.base_channels)


def _input_pyramid(config: GeneratorConfig, c_pyramid: int, C: int) -> tuple[nn.Module, int, int]:
    """The module that joins pyramid and features [C], and the widths of features and pyramid after it."""
    if config.progressive_input == "residual" and config.resample == "haar":
        return HaarInput(c_pyramid, C, skip_rescale=config.skip_rescale), C, C
    if config.progressive_input == "residual":
        module = ResidualInput(c_pyramid, C, resample=config.resample, skip_rescale=config.skip_rescale)
        return module, C, C
    if config.progressive_input == "input_skip":
        concatenates = config.progressive_combine == "cat"
        module = SkipInput(c_pyramid, C, resample=config.resample, concatenates=concatenates)
        return module, 2 * C if concatenates else C, c_pyramid
    return NoInput(), C, c_pyramid


def _level_resolutions(config: GeneratorConfig, image_size: int) -> list[int]:
    """Image side at each level.

    Raises:
        ValueError: The image cannot be halved often enough, or no level has a side named in attention_resolutions.
    """
    multipliers = config.channel_multipliers
    factor = 2 ** (len(multipliers) - 1)
    if config.resample == "haar":
        _check_haar(config, image_size)
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"image_size is {image_size}, but channel_multipliers {multipliers} make {len(multipliers)} levels, which "
            f"need a multiple of 2 ** {len(multipliers) - 1} = {factor}: prepare images of such a size, or give fewer "
            "channel_multipliers"
        )
    resolutions = [image_size >> i for i in range(len(multipliers))]
    for resolution in config.attention_resolutions:
        if resolution not in resolutions:
            raise ValueError(
                f"attention_resolutions has {resolution}, but at image_size {image_size} the levels have the sides "
                f"{resolutions}: choose from these, or give an empty list"
            )
    return resolutions


def _check_haar(config: GeneratorConfig, image_size: int) -> None:
    levels = len(config.channel_multipliers)
    if config.progressive_output != "none" or config.progressive_input == "input_skip":
        raise ValueError(
            f"resample is haar, which has no pyramid of images, but progressive_output is {config.progressive_output} "
            f"and progressive_input {config.progressive_input}: set progressive_output to none and progressive_input "
            "to residual or none, or resample to fir"
        )
    if image_size % 2**levels:
        raise ValueError(
            f"resample is haar, which halves the features of all {levels} levels, the last one in the middle of the "
            f"network, but image_size is {image_size}, not a multiple of 2 ** {levels} = {2**levels}: give fewer "
            "channel_multipliers, or set resample to fir"
        )
