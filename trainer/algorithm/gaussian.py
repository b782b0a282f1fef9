"""The gaussian method: the generator's network as an ordinary denoising diffusion model (DDPM, arXiv 2006.11239).

G learns to predict x0, or the noise in x_t, by least squares. What it learns is the mean of x0 given x_t, and each
reverse step is a Gaussian around it. That is exact in the limit of many small steps; in the few large ones of a DDGAN
the true step has many modes, which a Gaussian does not have (arXiv 2112.07804, section 3). Its latent z is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from models.diffusion import Diffusion, noise_in, noisy, x0_without
from models.dropout import KeepMask, masks_from
from models.generator import GeneratorConfig
from models.sampling import Sampler
from models.shapes import Image, Label, Latent, Timestep
from trainer.algorithm.method import MethodSettings, Part, Players
from trainer.algorithm.pairs import Labels, to_x0
from trainer.algorithm.randomness import Draws, Purpose
from trainer.algorithm.statistics import (
    Statistic,
    Statistics,
    add_statistics,
    by_timestep,
    count,
    mean,
    mean_by_timestep,
)

Prediction = Literal["x0", "epsilon"]
STATISTICS = (
    count("frequency_t", by_timestep=True),
    mean("loss_g", over="frequency_t"),
    mean_by_timestep("errors", over="frequency_t", curve="squared_error", label="squared errors"),
)
"""`frequency_t` counts the updates that were made, timestep by timestep."""


@dataclass(frozen=True)
class NoisyBatch:
    """Images of one forward pass of one rank, with noise.

    Attributes:
        t: step index; x_t is the image that step t makes cleaner.
        x0, x_t: clean and noisy.
        z: zeros, which the network takes for its latent.
        share: this micro-batch's part of the global batch; 0 for one that only fills up.
        dropout: gives the masks of G's dropout; None: torch's.
        label: as in `Pair`.
    """

    t: Timestep
    x0: Image
    x_t: Image
    z: Latent
    share: float
    dropout: KeepMask | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Gaussian:
    """Regression of the clean image, or of the noise.

    Attributes:
        prediction: what G's output is: the clean image, or the noise in x_t.
    """

    prediction: Prediction = "x0"

    parts: tuple[Part, ...] = ("g",)
    statistics: tuple[Statistic, ...] = STATISTICS
    penalties: tuple[str, ...] = ()
    penalty_interval_steps: int = 1
    samplers: tuple[Sampler, ...] = ("ancestral", "deterministic")

    @classmethod
    def of(cls, settings: MethodSettings, generator: GeneratorConfig) -> "Gaussian":
        """The regression that a config names.

        Raises:
            ValueError: the generator cannot make what it is to predict.
        """
        if settings.prediction == "epsilon" and generator.output_tanh:
            raise ValueError(
                "training.prediction is epsilon, but generator.output_tanh squashes the output into [-1, 1], which "
                "noise is not bound to: set generator.output_tanh to false"
            )
        return cls(settings.prediction)

    def without_penalties(self) -> "Gaussian":
        """The same: it has none."""
        return self

    @torch.no_grad()
    def draw(
        self,
        images: UInt8[Tensor, "b c h w"],
        draws: Draws,
        diffusion: Diffusion,
        *,
        latent_dim: int,
        flip: bool,
        share: float,
        labels: Labels | None = None,
    ) -> NoisyBatch:
        """Noisy images, by the draws of the adversarial method's update of G."""
        t = draws.integers(Purpose.G_TIMESTEP, diffusion.num_timesteps)
        x0 = to_x0(images, draws.flips() if flip else None)
        x_t = noisy(diffusion, x0, t, draws.normals(Purpose.G_NOISE_T, tuple(images.shape[1:])))
        z = torch.zeros(len(images), latent_dim, device=images.device)
        label = labels.drawn(draws, Purpose.G_LABEL_DROPOUT) if labels else None
        return NoisyBatch(t, x0, x_t, z, share, partial(draws.keeps, Purpose.G_DROPOUT), label)

    def update(self, part: Part, players: Players, batches: Sequence[NoisyBatch], step: int) -> Statistics:
        """One update of G: mean squared error of its prediction, DDPM (2006.11239) Eq. 14 for epsilon."""
        assert part == "g", "there is no discriminator"
        G, diffusion = players.forward("g"), players.diffusion
        total: Statistics = {}
        for batch in batches:
            with players.autocast(batch.x_t), masks_from(players.generator.module, batch.dropout):
                output = G(batch.x_t, batch.t, batch.z, batch.label).to(batch.x_t.dtype)
            target = batch.x0 if self.prediction == "x0" else noise_in(diffusion, batch.x_t, batch.x0, batch.t)
            errors = (output - target).square().mean(dim=(1, 2, 3))
            loss = errors.mean()
            players.generator.backward(loss * (batch.share * players.world_size))
            players.generator.step()
            of_each = {"errors": errors, "frequency_t": torch.ones_like(errors)}
            by_t = {name: by_timestep(diffusion.num_timesteps, batch.t, values) for name, values in of_each.items()}
            add_statistics(total, {"loss_g": loss, **by_t}, batch.share)
        return total

    def x0_predictor(
        self, generator: Callable[[Image, Timestep, Latent], Image], diffusion: Diffusion
    ) -> Callable[[Image, Timestep, Latent], Image]:
        """G's output without a latent; what is made of a predicted noise is clipped to [-1, 1]."""

        def predict(x_t: Image, t: Timestep, z: Latent) -> Image:
            output = generator(x_t, t, torch.zeros_like(z))
            return output if self.prediction == "x0" else x0_without(diffusion, x_t, output, t).clamp(-1.0, 1.0)

        return predict
