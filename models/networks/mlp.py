"""Perceptrons that replace the U-Net and the convolutional discriminator on low-dimensional data such as 2-D points.

They treat an image as one vector, whatever its size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import LatentMapping
from models.discriminator import LEAK, DiscriminatorConfig, seen_channels
from models.generator import GeneratorConfig, noise_conditioning
from models.layers import (
    NEAR_ZERO,
    LabelEmbedding,
    NoiseLevelEmbedding,
    SinusoidalEmbedding,
    TimeEmbedding,
    initialized,
)
from models.shapes import Image, ImageForm, Label, Latent, Logits, NoiseLevel, Predictions, Timestep


class Waves(nn.Module):
    """Values, and their sines and cosines at doubling frequencies (Tancik et al., 2006.10739, section 6).

    A plain perceptron is slow to learn what changes within a hundredth of the range, such as the edge of a narrow mode.
    """

    NUM_FREQUENCIES = 5
    FACTOR = 1 + 2 * NUM_FREQUENCIES

    def forward(self, x: Tensor) -> Tensor:
        """[B, N] to [B, FACTOR * N]."""
        phases = [math.pi * 2**k * x for k in range(self.NUM_FREQUENCIES)]
        return torch.cat([x, *(p.sin() for p in phases), *(p.cos() for p in phases)], dim=1)


class MlpGenerator(nn.Module):
    """x0_pred = G(x_t, t, z), with 1 + `num_res_blocks` hidden layers of width `base_channels`.

    Args:
        config: Width, depth and latent; settings that concern only images are ignored.
        form: Size, channels and classes of the images.
        noise_levels: As of `models.generator.Generator`.
    """

    def __init__(self, config: GeneratorConfig, form: ImageForm, noise_levels: Sequence[float] = ()) -> None:
        super().__init__()
        self.config = config
        self.noise = noise_conditioning(config, noise_levels)
        num_values, width = form.channels * form.size**2, config.base_channels
        embedding = NoiseLevelEmbedding(width) if self.noise.embedded else SinusoidalEmbedding(width)
        self.time_embedding = TimeEmbedding(embedding, width, nn.SiLU(), fan="average")
        self.mapping = LatentMapping(
            config.latent_dim, config.latent_embedding_dim, config.num_mapping_layers, form.num_classes
        )
        self.waves = Waves()
        self.layer_in = initialized(nn.Linear(Waves.FACTOR * num_values, width))
        self.time = initialized(nn.Linear(width, width))
        self.style = initialized(nn.Linear(config.latent_embedding_dim, width))
        self.layers = nn.ModuleList(initialized(nn.Linear(width, width)) for _ in range(config.num_res_blocks))
        self.layer_out = initialized(nn.Linear(width, num_values))

    def forward(self, x_t: Image, t: Timestep | NoiseLevel, z: Latent, label: Label | None = None) -> Image:
        """Predict x0; see `models.generator.Generator`."""
        temb = self.time_embedding(self.noise.seen(t))
        zemb = self.mapping(z if self.config.latent else torch.zeros_like(z), label)
        h = F.silu(self.layer_in(self.waves(x_t.flatten(1))) + self.time(temb) + self.style(zemb))
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.noise.x0_pred(self.layer_out(h).view_as(x_t), x_t, t)


class MlpDiscriminator(nn.Module):
    """logits = D(x_tm1, x_t, t), with four hidden layers of width `base_channels` and no minibatch deviation.

    Args:
        config: Width and time embedding; the settings of minibatch deviation are ignored.
        form: Size, channels and classes of the images.
    """

    NUM_LAYERS = 3

    def __init__(self, config: DiscriminatorConfig, form: ImageForm) -> None:
        super().__init__()
        self.config = config
        width = config.base_channels
        embedding = SinusoidalEmbedding(config.time_embedding_dim)
        self.time_embedding = TimeEmbedding(embedding, config.time_embedding_dim, nn.LeakyReLU(LEAK), fan="out")
        self.waves = Waves()
        self.layer_in = initialized(nn.Linear(Waves.FACTOR * seen_channels(config, form) * form.size**2, width))
        self.time = initialized(nn.Linear(config.time_embedding_dim, width))
        self.layers = nn.ModuleList(initialized(nn.Linear(width, width)) for _ in range(self.NUM_LAYERS))
        self.head = initialized(nn.Linear(width, 1))
        self.label = LabelEmbedding(form.num_classes, width, deviation=width**-0.5) if form.num_classes else None
        num_predicted = len(config.predicts) * form.channels * form.size**2
        self.predictions = (
            initialized(nn.Linear(width, num_predicted), scale=NEAR_ZERO) if config.predicts else nn.Identity()
        )

    def forward(
        self, x_tm1: Image, x_t: Image, t: Timestep, label: Label | None = None, *, predicting: bool = False
    ) -> Logits | tuple[Logits, Predictions]:
        """Judge a denoising step; see `models.discriminator.Discriminator`."""
        temb = self.time_embedding(t)
        judged = x_tm1 if self.config.sees == "marginal" else torch.cat([x_tm1, x_t], dim=1)
        h = self.layer_in(self.waves(judged.flatten(1))) + self.time(temb)
        for layer in self.layers:
            h = layer(F.leaky_relu(h, LEAK))
        h = F.leaky_relu(h, LEAK)
        logits = self.head(h)[:, 0]
        if self.label is not None:
            logits = logits + (self.label(label) * h).sum(dim=1)
        if not predicting:
            return logits
        return logits, tuple(self.predictions(h).unflatten(1, (-1, *x_tm1.shape[1:])).unbind(1))
