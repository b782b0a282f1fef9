"""Small parts shared by the generator and the discriminator: initialization, group norm, time and label embedding."""

import math
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.fused.norm import group_norm as group_norm_with_style
from models.fused.operator import can_fuse
from models.shapes import Embedding, Features, Label, Style, Timestep

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)
Fan = Literal["average", "out"]

# Scale of layers whose initial output should be near zero, but which still get a gradient.
NEAR_ZERO = 1e-10


def initialized(layer: LayerT, *, fan: Fan = "average", scale: float = 1.0) -> LayerT:
    """Draw a layer's weights from U(-l, l), l = sqrt(3 scale / fan), with torch's global generator; zero its biases.

    Args:
        layer: Linear or convolution, changed in place.
        fan: `average` of fan-in and fan-out, used in most of the generator, or fan-`out`.
        scale: Variance of the weights times the fan.
    """
    area = layer.weight[0, 0].numel()
    fan_out = layer.weight.shape[0] * area
    fan_in = layer.weight.shape[1] * area
    limit = math.sqrt(3 * scale / (fan_out if fan == "out" else (fan_in + fan_out) / 2))
    nn.init.uniform_(layer.weight, -limit, limit)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group norm with SiLU, and with scale and shift that differ by sample, in one operation on a GPU."""

    def forward(self, input: Features, style: Style | None = None, *, silu: bool = False) -> Features:
        """Normalize the input.

        Args:
            input: Features.
            style: Scale, then shift of each channel for each sample. Required unless the module has its own (`affine`).
            silu: Apply SiLU to the result.
        """
        if style is None and not can_fuse(input):
            h = super().forward(input)
            return F.silu(h) if silu else h
        style = torch.cat([self.weight, self.bias])[None] if style is None else style
        return group_norm_with_style(input, style, self.num_groups, self.eps, silu)


def group_norm(num_channels: int, *, affine: bool = True) -> GroupNorm:
    """Group norm with min(C // 4, 32) groups.

    Raises:
        ValueError: The groups cannot be of equal size.
    """
    num_groups = min(num_channels // 4, 32)
    if num_groups == 0 or num_channels % num_groups:
        raise ValueError(
            f"a layer of {num_channels} channels cannot be split into {num_groups} equal groups for group norm. Layers "
            "are base_channels x channel_multipliers wide, or the sum of two such widths where a skip joins: choose "
            "base_channels and channel_multipliers so that each width is a multiple of 4, and from 128 on of 32"
        )
    return GroupNorm(num_groups, num_channels, eps=1e-6, affine=affine)


class SinusoidalEmbedding(nn.Module):
    """[sin | cos] of t at geometrically spaced frequencies (DDPM, arXiv 2006.11239)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(
                f"a time embedding of width {width} cannot be split into sines and cosines: set the generator's "
                "base_channels and the discriminator's time_embedding_dim to even numbers of at least 4"
            )
        self.width = width
        half = width // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Timestep) -> Embedding:
        """Embed each step index."""
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """[sin | cos] of log(t + 1) at fixed random frequencies.

    The published code uses log(t), which is -inf at t = 0. Networks trained with it get different inputs here.
    """

    frequencies: Tensor

    def __init__(self, num_frequencies: int, scale: float) -> None:
        super().__init__()
        self.width = 2 * num_frequencies
        # Random, so they must be saved in the state dict.
        self.register_buffer("frequencies", torch.randn(num_frequencies) * scale)

    def forward(self, t: Timestep) -> Embedding:
        """Embed each step index."""
        phase = 2 * math.pi * torch.log(t[:, None].to(self.frequencies) + 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron over an embedding of t. Its output is already activated, because every user needs that."""

    def __init__(
        self, embedding: SinusoidalEmbedding | FourierEmbedding, width: int, activation: nn.Module, fan: Fan
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.linear1 = initialized(nn.Linear(embedding.width, width), fan=fan)
        self.linear2 = initialized(nn.Linear(width, width), fan=fan)
        self.activation = activation

    def forward(self, t: Timestep) -> Embedding:
        """Embed each step index."""
        return self.activation(self.linear2(self.activation(self.linear1(self.embedding(t)))))


class LabelEmbedding(nn.Module):
    """A vector for each label. Row `num_classes` is the vector for "no label".

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        width: length of each vector.
        deviation: standard deviation of its initial values.
    """

    def __init__(self, num_classes: int, width: int, *, deviation: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding.weight, std=deviation)

    def forward(self, label: Label | None) -> Float[Tensor, "b width"]:
        """The vector of each label.

        Raises:
            ValueError: a network with classes was given no labels.
        """
        if label is None:
            raise ValueError("this network has classes but got no labels: pass num_classes for `no label`")
        return self.embedding(label)
