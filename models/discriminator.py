"""The discriminator D(x_tm1, x_t, t): does x_tm1 look like a real, cleaner version of x_t?

Everything here is twice differentiable, as the R1 penalty requires.

Shape letters: B batch, C channels, H W height and width. `temb` [B, time_embedding_dim] is the embedded time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import merge
from models.fused.leaky import leaky_relu
from models.fused.operator import can_fuse
from models.layers import (
    NEAR_ZERO,
    Block,
    Convolution,
    LabelEmbedding,
    SinusoidalEmbedding,
    TimeEmbedding,
    are_whole,
    convolve,
    initialized,
    join,
)
from models.minibatch_deviation import Grouping, append_deviation
from models.resample import FirDownsample, FirUpsample
from models.shapes import Condition, Embedding, Features, Image, ImageForm, Label, Logits, Predictions, Timestep

# For each block: (width in units of base_channels, whether it halves the resolution).
BLOCKS = {
    "small": ((2, False), (4, True), (8, True), (8, True)),
    "large": ((4, True), (8, True), (8, True), (8, True), (8, True), (8, True)),
}
LEAK = 0.2
Predicted = Literal["x0", "x_t"]
"""What a discriminator can predict of x_tm1 next to its judgement."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The discriminator, which tells real denoising steps from generated ones."""

    kind: Literal["small", "large", "resnext", "mlp"] = "small"
    """Architecture. `small` halves the image three times, for images up to 64 px; `large` six times, for 256 px.
    `resnext` halves it to 4 px, by the blocks of R3GAN, without minibatch deviation. `mlp` is a perceptron without
    minibatch deviation, for points of the plane."""
    base_channels: Annotated[int, Field(gt=0, le=1024, description="published networks have 64")] = 64
    """Unit of the layers' widths: the first layer has 2 times as many channels, the widest 8 times. With `resnext`, 12
    times up to 32 px, and half as many at each doubling above. With `mlp`, the width of each layer."""
    time_embedding_dim: Annotated[
        int, Field(ge=4, le=65_536, multiple_of=2, description="wider networks fit no device")
    ] = 256
    """Width of the time embedding, an even number."""
    sees: Literal["pair", "marginal"] = "pair"
    """What it judges. `pair`: x_tm1 together with the x_t that it was made from, as published. `marginal`: x_tm1 alone,
    as in SIDDM and AFM; then training.transport, afd or reconstruction has to tie x_tm1 to its x_t."""
    predicts: tuple[Predicted, ...] = ()
    """What it predicts of x_tm1 next to its judgement, as images. `x0`: the clean image of real ones, for
    training.denoising. `x_t`: the noisier image of generated ones, for training.afd. It then has a decoder as well.
    []: nothing, as published."""
    init_from: Literal["generator"] | None = None
    """`generator`: where a run or a stage starts from a trained generator, its first convolutions start as those of the
    generator's encoder that have the same shape; run.init_from_discriminator has then no effect. null: new weights,
    or those of run.init_from_discriminator."""
    stddev_group_size: PositiveInt = 4
    """Images whose features are compared with each other in the minibatch standard deviation."""
    stddev_grouping: Grouping = "contiguous"
    """`contiguous`: neighbours form a group, the same at any world size. `strided`: over the rank's batch, as
    images spread over a forward pass (`strided`), as in the authors' code."""

    def __post_init__(self) -> None:
        """Refuse a prediction that is named twice."""
        if len(set(self.predicts)) < len(self.predicts):
            raise ValueError(f"predicts is [{', '.join(self.predicts)}]: name each prediction once")


def activated(conv: nn.Conv2d, x: Features, shift: Embedding | None = None) -> Float[Tensor, "b c_out h w"]:
    """Leaky ReLU of a convolution's result, to which `shift` [B, C] is added first."""
    if can_fuse(x) and conv.bias is not None and are_whole(conv):
        h = convolve(x, conv.weight, None, conv.padding, conv.groups)
        return leaky_relu(h, conv.bias[None] if shift is None else conv.bias + shift, LEAK)
    h = conv(x)
    return F.leaky_relu(h if shift is None else h + shift[:, :, None, None], LEAK)


class DownBlock(Block):
    """Residual block, conditioned on time; can halve the resolution."""

    def __init__(self, c_in: int, c_out: int, *, time_channels: int, halves: bool) -> None:
        super().__init__()
        self.conv1 = initialized(Convolution(c_in, c_out, 3, padding=1), fan="out")
        self.time = initialized(nn.Linear(time_channels, c_out), fan="out")
        self.resample = FirDownsample() if halves else nn.Identity()
        self.conv2 = initialized(Convolution(c_out, c_out, 3, padding=1), fan="out", scale=NEAR_ZERO)
        self.shortcut = initialized(Convolution(c_in, c_out, 1, bias=False), fan="out")

    def forward(self, x: Features, temb: Embedding) -> Float[Tensor, "b c_out h_out w_out"]:
        """Transform features, given the activated time embedding."""
        h = activated(self.conv1, F.leaky_relu(x, LEAK), self.time(temb))
        h = self.conv2(self.resample(h))
        return merge(self.shortcut(self.resample(x)), h, rescale=True)


class DecoderBlock(Block):
    """Joins features with those from before they were halved, as a feature pyramid does (FPN, 1612.03144).

    It is cheaper than a block of the generator's decoder: features are narrowed before they are doubled, and the sum,
    not the concatenation, gets one convolution.
    """

    def __init__(self, c_in: int, c_out: int, *, doubles: bool) -> None:
        super().__init__()
        self.lateral = initialized(Convolution(c_in, c_out, 1), fan="out")
        self.resample = FirUpsample() if doubles else nn.Identity()
        self.conv = initialized(Convolution(c_out, c_out, 3, padding=1), fan="out")

    def forward(self, h: Float[Tensor, "b c_in h_in w_in"], skip: Features) -> Features:
        """Features of the resolution and width of `skip`."""
        h = merge(self.resample(self.lateral(h)), skip, rescale=True)
        return merge(h, activated(self.conv, F.leaky_relu(h, LEAK)), rescale=True)


class Decoder(nn.Module):
    """What a discriminator predicts, from the features of its blocks: with these a U-Net (SIDDM, 2306.12511).

    Args:
        widths: channels of the features before the first block and after each.
        halves: whether each block halves the resolution.
        num_channels: of each predicted image.
        num_images: how many are predicted.
    """

    def __init__(self, widths: Sequence[int], halves: Sequence[bool], num_channels: int, num_images: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            DecoderBlock(c_in, c_out, doubles=doubles)
            for (c_out, c_in), doubles in reversed(list(zip(pairwise(widths), halves, strict=True)))
        )
        # Predictions start near zero, and so does what they add to a gradient.
        self.conv_out = nn.ModuleList(
            initialized(Convolution(widths[0], num_channels, 3, padding=1), fan="out", scale=NEAR_ZERO)
            for _ in range(num_images)
        )

    def forward(self, *features: Tensor) -> Predictions:
        """All predictions, from the features that `widths` describes."""
        *skips, h = features
        for block in self.blocks:
            h = block(h, skips.pop())
        h = F.leaky_relu(h, LEAK)
        return tuple(conv(h) for conv in self.conv_out)


class Discriminator(nn.Module):
    """logits = D(x_tm1, x_t, t), one per sample, without a sigmoid.

    Args:
        config: Architecture.
        form: Channels and classes of the images; any size that `check_image_size` allows will do. With classes, the
            inner product of the last features and the label's embedding is added to the logits (Miyato and Koyama,
            1802.05637, Eq. 3).
    """

    def __init__(self, config: DiscriminatorConfig, form: ImageForm) -> None:
        super().__init__()
        self.config = config
        embedding = SinusoidalEmbedding(config.time_embedding_dim)
        self.time_embedding = TimeEmbedding(embedding, config.time_embedding_dim, nn.LeakyReLU(LEAK), fan="out")
        C = 2 * config.base_channels
        self.conv_in = initialized(Convolution(seen_channels(config, form), C, 1), fan="out")
        self.blocks = nn.ModuleList()
        widths = [C]
        for multiplier, halves in BLOCKS[config.kind]:
            c_out = multiplier * config.base_channels
            self.blocks.append(DownBlock(C, c_out, time_channels=config.time_embedding_dim, halves=halves))
            C = c_out
            widths.append(C)
        # Only the small network starts with this convolution near zero, as in the published code.
        scale = NEAR_ZERO if config.kind == "small" else 1.0
        self.conv_out = initialized(Convolution(C + 1, C, 3, padding=1), fan="out", scale=scale)
        self.head = initialized(nn.Linear(C, 1), fan="out")
        # Same scale as the head: with smaller vectors, labels had no effect for the first thousand steps.
        self.label = LabelEmbedding(form.num_classes, C, deviation=1.0) if form.num_classes else None
        self.decoder = decoder(config, form, widths, [halves for _, halves in BLOCKS[config.kind]])

    def forward(
        self,
        x_tm1: Image,
        x_t: Image,
        t: Timestep,
        label: Label | None = None,
        condition: Condition | None = None,
        *,
        predicting: bool = False,
    ) -> Logits | tuple[Logits, Predictions]:
        """Judge a denoising step.

        Args:
            x_tm1: Cleaner image, real or fake.
            x_t: Noisier image of the same step; of no effect if the network sees x_tm1 alone.
            t: Step index, 0 .. T-1.
            label: 0 .. num_classes - 1, or num_classes for no label. Required if the network has classes.
            condition: Image that is given, which is judged with them. Required if the network was built with its
                channels.
            predicting: Predict as well; only with `config.predicts`.

        Returns:
            Logits, large where x_tm1 looks real; if `predicting`, what it predicts as well, x0 before x_t.

        Raises:
            ValueError: The image cannot be halved often enough, or the batch cannot be split into groups.
        """
        check_image_size(self.config, x_t.shape[2])
        temb = self.time_embedding(t)
        judged = [x for x in (x_tm1, None if self.config.sees == "marginal" else x_t, condition) if x is not None]
        h = self.conv_in(judged[0] if len(judged) == 1 else join(judged))
        features = [h]
        for block in self.blocks:
            h = block(h, temb)
            features.append(h)
        h = append_deviation(h, self.config.stddev_group_size, self.config.stddev_grouping)
        h = activated(self.conv_out, h).sum(dim=(2, 3))
        logits = self.head(h)[:, 0]
        if self.label is not None:
            logits = logits + (self.label(label) * h).sum(dim=1)
        if not predicting:
            return logits
        assert self.decoder is not None, "only a discriminator that predicts has a decoder"
        return logits, self.decoder(*features)


def decoder(
    config: DiscriminatorConfig, form: ImageForm, widths: Sequence[int], halves: Sequence[bool]
) -> Decoder | None:
    """The decoder of a discriminator whose features are those that `Decoder` describes; None if it does not predict."""
    return Decoder(widths, halves, form.channels, len(config.predicts)) if config.predicts else None


def seen_channels(config: DiscriminatorConfig, form: ImageForm) -> int:
    """Channels of what the discriminator judges."""
    return (1 if config.sees == "marginal" else 2) * form.channels + form.condition_channels


def check_image_size(config: DiscriminatorConfig, image_size: int) -> None:
    """Check that the image can be halved as often as the discriminator halves it.

    Raises:
        ValueError: It cannot.
    """
    if config.kind == "resnext":
        _check_resnext_size(config, image_size)
        return
    num_halvings = sum(halves for _, halves in BLOCKS[config.kind])
    factor = 2**num_halvings
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"image_size is {image_size}, but the {config.kind} discriminator halves it {num_halvings} times, which "
            f"needs a multiple of {factor}: prepare images of such a size, or choose another discriminator.kind from "
            f"{', '.join(BLOCKS)}"
        )


def resnext_width(config: DiscriminatorConfig, side: int) -> int:
    """Channels at a resolution of kind `resnext`: for base_channels 64 those of R3GAN, 768 up to 32 px."""
    return 12 * config.base_channels * 32 // max(side, 32)


def _check_resnext_size(config: DiscriminatorConfig, image_size: int) -> None:
    others = ", ".join(BLOCKS)
    if image_size < 4 or image_size & (image_size - 1):
        raise ValueError(
            f"image_size is {image_size}, but the resnext discriminator halves it to 4 pixels, which needs a power of "
            f"two of at least 4: prepare images of such a size, or choose another discriminator.kind from {others}"
        )
    side = max(image_size, 32)
    multiple = side // math.gcd(side, 48)  # the least width, 12 * 32 / side times as many, is a multiple of 8
    if config.base_channels % multiple:
        raise ValueError(
            f"discriminator.base_channels is {config.base_channels}, but the resnext discriminator of {image_size} "
            f"pixels needs a multiple of {multiple}, so that each of its widths is a multiple of 8"
        )
