"""A discriminator of ResNeXt blocks without any normalization, as in R3GAN (2501.05441).

A pair (x_tm1, x_t) and the step take the place of R3GAN's image: the embedded time is a bias of each block's first
convolution. It has no minibatch deviation. Everything here is twice differentiable, as the R1 penalty requires.
"""

import math
from typing import TypeVar

from torch import Tensor, nn

from models.discriminator import (
    LEAK,
    DiscriminatorConfig,
    activated,
    check_image_size,
    decoder,
    resnext_width,
    seen_channels,
)
from models.layers import (
    Block,
    Convolution,
    LabelEmbedding,
    SinusoidalEmbedding,
    TimeEmbedding,
    initialized,
    join,
)
from models.resample import BinomialDownsample
from models.shapes import Condition, Embedding, Features, Image, ImageForm, Label, Logits, Predictions, Timestep

GROUP = 16
"""Channels of a group of the 3 x 3 convolutions."""
LAST_SIDE = 4
"""Side of the features that the judgement is made of."""
NUM_BLOCKS = 2
"""Blocks at each resolution."""
LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)


def normal(layer: LayerT, gain: float = 1.0) -> LayerT:
    """Draw a layer's weights from N(0, gain^2 / fan_in), with torch's global generator; zero its biases."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResNeXtBlock(Block):
    """x plus 1 x 1, grouped 3 x 3 and 1 x 1 convolution, the middle twice as wide.

    Args:
        channels: width of x, a multiple of 8.
        time_channels: width of the time embedding.
        num_blocks: blocks of the network, by which they start smaller, as in Fixup (1901.09321).
    """

    def __init__(self, channels: int, *, time_channels: int, num_blocks: int) -> None:
        super().__init__()
        width, gain = 2 * channels, math.sqrt(2 / (1 + LEAK**2)) * num_blocks**-0.25
        self.conv1 = normal(Convolution(channels, width, 1), gain)
        self.time = initialized(nn.Linear(time_channels, width), fan="out")
        self.conv2 = normal(Convolution(width, width, 3, padding=1, groups=width // GROUP), gain)
        self.conv3 = normal(Convolution(width, channels, 1, bias=False), 0.0)

    def forward(self, x: Features, temb: Embedding) -> Features:
        """Transform features, given the activated time embedding."""
        h = activated(self.conv1, x, self.time(temb))
        return x + self.conv3(activated(self.conv2, h))


class ResNeXtDiscriminator(nn.Module):
    """logits = D(x_tm1, x_t, t), one per sample, without a sigmoid.

    Args:
        config: Architecture; the settings of minibatch deviation are ignored.
        form: Size, channels and classes of the images. With classes, the inner product of the last features and the
            label's embedding is added to the logits.

    Raises:
        ValueError: The image is of another size than it can be halved to 4 pixels, or a width cannot be grouped.
    """

    def __init__(self, config: DiscriminatorConfig, form: ImageForm) -> None:
        super().__init__()
        check_image_size(config, form.size)
        self.config = config
        embedding = SinusoidalEmbedding(config.time_embedding_dim)
        self.time_embedding = TimeEmbedding(embedding, config.time_embedding_dim, nn.LeakyReLU(LEAK), fan="out")
        sides = [form.size >> i for i in range(form.size.bit_length()) if form.size >> i >= LAST_SIDE]
        widths = [resnext_width(config, side) for side in sides]
        self.conv_in = normal(Convolution(seen_channels(config, form), widths[0], 1))
        self.resample = BinomialDownsample()
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            wider = i > 0 and width != widths[i - 1]
            self.transitions.append(
                normal(Convolution(widths[i - 1], width, 1, bias=False)) if wider else nn.Identity()
            )
            self.stages.append(
                nn.ModuleList(
                    ResNeXtBlock(width, time_channels=config.time_embedding_dim, num_blocks=NUM_BLOCKS * len(widths))
                    for _ in range(NUM_BLOCKS)
                )
            )
        C = widths[-1]
        self.conv_out = normal(Convolution(C, C, LAST_SIDE, bias=False, groups=C))
        self.head = normal(nn.Linear(C, 1))
        self.label = LabelEmbedding(form.num_classes, C, deviation=C**-0.5) if form.num_classes else None
        self.decoder = decoder(config, form, widths, [True] * (len(widths) - 1))

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
        """Judge a denoising step; see `models.discriminator.Discriminator`."""
        temb = self.time_embedding(t)
        judged = [x for x in (x_tm1, None if self.config.sees == "marginal" else x_t, condition) if x is not None]
        h = self.conv_in(judged[0] if len(judged) == 1 else join(judged))
        features: list[Tensor] = []
        for transition, blocks in zip(self.transitions, self.stages, strict=True):
            if features:
                h = transition(self.resample(h))
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(h, temb)
            features.append(h)
        h = self.conv_out(h).flatten(1)
        logits = self.head(h)[:, 0]
        if self.label is not None:
            logits = logits + (self.label(label) * h).sum(dim=1)
        if not predicting:
            return logits
        assert self.decoder is not None, "only a discriminator that predicts has a decoder"
        return logits, self.decoder(*features)
