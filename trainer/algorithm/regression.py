"""Objective `gaussian`: the generator's network as an ordinary denoising diffusion model (DDPM, arXiv 2006.11239).

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
from models.shapes import Image, Label, Latent, Timestep
from trainer.algorithm.pairs import Labels, to_x0
from trainer.algorithm.randomness import Draws, Purpose
from trainer.algorithm.step import Players, Statistics, add_statistics, by_timestep

Prediction = Literal["x0", "epsilon"]


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


@torch.no_grad()
def draw_noisy_batch(
    images: UInt8[Tensor, "b c h w"],
    draws: Draws,
    diffusion: Diffusion,
    *,
    latent_dim: int,
    flip: bool,
    share: float,
    labels: Labels | None = None,
) -> NoisyBatch:
    """A pure function of images and (seed, step, sample), by the draws of G's update; see `draw_micro_batch`."""
    t = draws.integers(Purpose.G_TIMESTEP, diffusion.num_timesteps)
    x0 = to_x0(images, draws.flips() if flip else None)
    x_t = noisy(diffusion, x0, t, draws.normals(Purpose.G_NOISE_T, tuple(images.shape[1:])))
    z = torch.zeros(len(images), latent_dim, device=images.device)
    label = labels.drawn(draws, Purpose.G_LABEL_DROPOUT) if labels else None
    return NoisyBatch(t, x0, x_t, z, share, partial(draws.keeps, Purpose.G_DROPOUT), label)


def update_denoiser(players: Players, batches: Sequence[NoisyBatch], prediction: Prediction) -> Statistics:
    """One update of G: mean squared error of its prediction, DDPM (2006.11239) Eq. 14 for epsilon.

    Args:
        players: the networks; there is no discriminator.
        batches: as many as the engine accumulates.
        prediction: what G's output stands for.
    """
    G, diffusion = players.forward_g, players.diffusion
    total: Statistics = {}
    for batch in batches:
        with players.autocast(batch.x_t), masks_from(players.generator.module, batch.dropout):
            output = G(batch.x_t, batch.t, batch.z, batch.label).to(batch.x_t.dtype)
        target = batch.x0 if prediction == "x0" else noise_in(diffusion, batch.x_t, batch.x0, batch.t)
        errors = (output - target).square().mean(dim=(1, 2, 3))
        loss = errors.mean()
        players.generator.backward(loss * (batch.share * players.world_size))
        players.generator.step()
        of_each = {"errors": errors, "frequency_t": torch.ones_like(errors)}
        statistics = {name: by_timestep(diffusion.num_timesteps, batch.t, values) for name, values in of_each.items()}
        add_statistics(total, {"loss_g": loss, **statistics}, batch.share)
    return total


def x0_predictor(
    generator: Callable[[Image, Timestep, Latent], Image], diffusion: Diffusion, prediction: Prediction
) -> Callable[[Image, Timestep, Latent], Image]:
    """G as a map from (x_t, t, z) to x0_pred, whatever it predicts; from the noise it is clipped to [-1, 1]."""

    def predict(x_t: Image, t: Timestep, z: Latent) -> Image:
        output = generator(x_t, t, torch.zeros_like(z))
        return output if prediction == "x0" else x0_without(diffusion, x_t, output, t).clamp(-1.0, 1.0)

    return predict
