"""The gaussian method: trains the generator as an ordinary denoising diffusion model (DDPM, arXiv 2006.11239).

G learns to predict x0, or the noise in x_t, by least squares: it learns the mean of x0 given x_t, and each reverse
step is a Gaussian around it. This is exact in the limit of many small steps. In the few large steps of a DDGAN the true
step is multimodal, which a Gaussian is not (arXiv 2112.07804, section 3). The latent z is always zero.

It trains at the noise levels of the steps, or at continuous ones, as EDM does (2206.00364): then the same weights serve
any steps, and are what an adversarial run may start from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from models.diffusion import Diffusion, Sampler, nearest_step, noise_in, noisy, noisy_at, x0_without
from models.dropout import KeepMask, masks_from
from models.generator import GeneratorConfig
from models.noise_levels import NoiseConfig
from models.shapes import Condition, Image, Label, Latent, NoiseLevel, Timestep
from trainer.algorithm.method import MethodSettings, Part, Players, Prediction
from trainer.algorithm.pairs import RawBatch, given, laid_out, to_x0
from trainer.algorithm.randomness import Purpose
from trainer.algorithm.statistics import (
    Statistic,
    Statistics,
    add_statistics,
    by_timestep,
    count,
    mean,
    mean_by_timestep,
)

STATISTICS = (
    count("frequency_t", by_timestep=True),
    mean("loss_g", over="frequency_t"),
    mean_by_timestep("errors", over="frequency_t", curve="squared_error", label="squared errors"),
)
"""`frequency_t` counts updates per timestep; skipped updates are not counted."""


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy images of one forward pass of one rank.

    Attributes:
        t: step index; x_t is the input of denoising step t.
        x0, x_t: clean and noisy images.
        z: zeros, fed to the network as its latent.
        share: this micro-batch's fraction of the global batch; 0 for padding.
        dropout: gives the masks of G's dropout; None: torch's own.
        label: as in `Pair`.
        sigma: noise level of each sample if it is none of a step's; t is then the step with the nearest one.
        condition: as in `Pair`.
    """

    t: Timestep
    x0: Image
    x_t: Image
    z: Latent
    share: float
    dropout: KeepMask | None = None
    label: Label | None = None
    sigma: NoiseLevel | None = None
    condition: Condition | None = None


@dataclass(frozen=True)
class Gaussian:
    """Regression of the clean image or of the noise.

    Attributes:
        prediction: what G predicts: the clean image (`x0`) or the noise in x_t (`epsilon`).
        noise: the noise levels.
        sigma_data: standard deviation of the data, for the weight of continuous noise levels.
    """

    prediction: Prediction = "x0"
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sigma_data: float = 0.5

    parts: tuple[Part, ...] = ("g",)
    statistics: tuple[Statistic, ...] = STATISTICS
    penalties: tuple[str, ...] = ()
    penalty_interval_steps: int = 1
    samplers: tuple[Sampler, ...] = ("ancestral", "deterministic")
    uses_latent: bool = False

    @classmethod
    def of(cls, settings: MethodSettings, generator: GeneratorConfig) -> "Gaussian":
        """The regression that a config describes.

        Raises:
            ValueError: the generator's output cannot reach the values it should predict.
        """
        if settings.prediction == "epsilon" and generator.output_tanh:
            raise ValueError(
                "training.prediction is epsilon, but generator.output_tanh limits the output to [-1, 1], and noise "
                "exceeds that range: set generator.output_tanh to false"
            )
        noise = settings.noise
        if noise.kind == "log_normal" and settings.prediction != "x0":
            raise ValueError(
                f"training.noise.kind is log_normal, but training.prediction is {settings.prediction}: set "
                "training.prediction to x0, or training.noise.kind to steps"
            )
        if noise.kind == "log_normal" and generator.time_embedding != "log_sigma":
            raise ValueError(
                "training.noise.kind is log_normal, but generator.time_embedding is "
                f"{generator.time_embedding}, which sees only the step: set generator.time_embedding to log_sigma"
            )
        if settings.prediction == "epsilon" and generator.sigma_data is not None:
            raise ValueError(
                "training.prediction is epsilon, but with generator.sigma_data the generator predicts x0: set "
                "training.prediction to x0, or generator.sigma_data to null"
            )
        return cls(settings.prediction, noise, generator.sigma_data or 0.5)

    def without_penalties(self) -> "Gaussian":
        """The method itself: it has no penalties."""
        return self

    def starting_at(self, step: int) -> "Gaussian":
        """The same method: nothing in it changes over a run."""
        return self

    def at(self, step: int, part: Part | None = None) -> "Gaussian":
        """The same method: nothing in it changes over a run."""
        return self

    @torch.no_grad()
    def draw(self, raw: RawBatch, diffusion: Diffusion) -> NoisyBatch:
        """Noisy images, by the draws of the adversarial method's update of G."""
        images, draws = raw.images, raw.draws
        x0 = laid_out(to_x0(images, draws.flips() if raw.flip else None, raw.domain), raw.memory_format)
        noise = laid_out(draws.normals(Purpose.G_NOISE_T, tuple(x0.shape[1:])), raw.memory_format)
        if self.noise.kind == "steps":
            sigma, t = None, draws.integers(Purpose.G_TIMESTEP, diffusion.num_timesteps)
            x_t = noisy(diffusion, x0, t, noise)
        else:
            log_sigma = (
                self.noise.log_mean + self.noise.log_deviation * draws.normals(Purpose.G_NOISE_LEVEL, (1,))[:, 0]
            )
            sigma, t = log_sigma.exp(), nearest_step(diffusion, log_sigma)
            x_t = noisy_at(sigma, x0, noise)
        z = torch.zeros(len(images), raw.latent_dim, device=images.device)
        label = raw.labels.drawn(draws, Purpose.G_LABEL_DROPOUT) if raw.labels else None
        condition = None
        if raw.conditions:
            condition = raw.conditions.drawn(raw.conditions.as_given(raw), raw, Purpose.G_CONDITION_DROPOUT)
        return NoisyBatch(t, x0, x_t, z, raw.share, partial(draws.keeps, Purpose.G_DROPOUT), label, sigma, condition)

    def update(self, part: Part, players: Players, batches: Sequence[NoisyBatch], step: int = 0) -> Statistics:
        """One update of G on the mean squared error of its prediction, weighted if the noise levels are continuous.

        For epsilon it is DDPM (2006.11239) Eq. 14, for continuous noise levels EDM (2206.00364) Eq. 2.
        """
        assert part == "g", "there is no discriminator"
        G, diffusion = players.forward("g"), players.diffusion
        total: Statistics = {}
        for batch in batches:
            with players.autocast(batch.x_t), masks_from(players.generator.module, batch.dropout):
                seen = batch.t if batch.sigma is None else batch.sigma
                output = G(batch.x_t, seen, batch.z, *given(batch.label, batch.condition)).to(batch.x_t.dtype)
            target = batch.x0 if self.prediction == "x0" else noise_in(diffusion, batch.x_t, batch.x0, batch.t)
            errors = (output - target).square().mean(dim=(1, 2, 3))
            loss = (errors if batch.sigma is None else errors * self._weight(batch.sigma)).mean()
            players.generator.backward(loss * (batch.share * players.world_size))
            players.generator.step()
            of_each = {"errors": errors, "frequency_t": torch.ones_like(errors)}
            by_t = {name: by_timestep(diffusion.num_timesteps, batch.t, values) for name, values in of_each.items()}
            add_statistics(total, {"loss_g": loss, **by_t}, batch.share)
        return total

    def _weight(self, sigma: NoiseLevel) -> NoiseLevel:
        weight = (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
        return weight if self.noise.max_weight is None else weight.clamp(max=self.noise.max_weight)

    def x0_predictor(
        self, generator: Callable[[Image, Timestep, Latent], Image], diffusion: Diffusion
    ) -> Callable[[Image, Timestep, Latent], Image]:
        """G's prediction with z = 0; an x0 computed from predicted noise is clipped to [-1, 1]."""

        def predict(x_t: Image, t: Timestep, z: Latent) -> Image:
            output = generator(x_t, t, torch.zeros_like(z))
            return output if self.prediction == "x0" else x0_without(diffusion, x_t, output, t).clamp(-1.0, 1.0)

        return predict
