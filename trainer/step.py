"""One discriminator update and one generator update: the whole algorithm (arXiv 2112.07804, section 4 and appendix).

The engines decide how gradients are reduced and parameters updated; this file decides what is computed. It draws no
random number and reads no scalar off the device: the noise comes in, sums of statistics go out as tensors.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.diffusion import Diffusion, forward_pair, sample_posterior
from models.shapes import Image, Latent, Timestep
from trainer.engines import Engine
from trainer.losses import fake_loss, generator_loss, r1_penalty, real_loss
from trainer.randomness import Draws, Purpose


@dataclass(frozen=True)
class Noise:
    """The random draws of one update for one micro-batch."""

    t: Timestep
    noise_tm1: Image
    """Makes x_tm1 from x0."""
    noise_t: Image
    """Makes x_t from x_tm1."""
    z: Latent
    noise_posterior: Image
    """Makes the fake x_tm1 from G's x0_pred."""


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass of one rank, with the draws of both updates.

    Attributes:
        x0: images in [-1, 1].
        noise_d: draws of the discriminator update.
        noise_g: draws of the generator update: fresh t, noises and z for the same images.
        share: this micro-batch's part of the global batch; the shares of all ranks sum to 1.
    """

    x0: Image
    noise_d: Noise
    noise_g: Noise
    share: float


@dataclass(frozen=True)
class Players:
    """The two networks in their engines, and what both updates need.

    Attributes:
        generator, discriminator: the engines.
        diffusion: tables of the forward process and its posterior, on the device.
        r1_gamma: weight of R1; r1_gamma / 2 multiplies the squared gradient norm.
        world_size: number of ranks over which the engines average gradients.
        bf16: compute in bfloat16 except R1 and the losses.
    """

    generator: Engine
    discriminator: Engine
    diffusion: Diffusion
    r1_gamma: float
    world_size: int = 1
    bf16: bool = False

    def autocast(self, x0: Image) -> AbstractContextManager:
        """The region of low-precision compute. Engines are bypassed in the forward pass, so it is opened here."""
        return torch.autocast(x0.device.type, torch.bfloat16) if self.bf16 else nullcontext()


Statistics = dict[str, Tensor]
"""Sums over micro-batches, each weighted by its share; summed over the ranks they are means over the global batch."""


def update_discriminator(
    players: Players, micro_batches: Sequence[MicroBatch], *, with_r1: bool, measure_norm: bool = False
) -> Statistics:
    """One update of D: real pairs (x_tm1, x_t) against pairs whose x_tm1 comes from G and the posterior.

    Args:
        players: the networks.
        micro_batches: as many as the engines accumulate.
        with_r1: add the R1 penalty on the real x_tm1, in float32, without multiplying it by its interval.
        measure_norm: keep the gradient norm for the log.
    """
    G, D, diffusion = players.generator.module, players.discriminator.module, players.diffusion
    total: Statistics = {}
    for batch in micro_batches:
        noise, t = batch.noise_d, batch.noise_d.t
        with torch.no_grad(), players.autocast(batch.x0):
            x_tm1, x_t = forward_pair(diffusion, batch.x0, t, noise.noise_tm1, noise.noise_t)
            x0_pred = G(x_t, t, noise.z).float()
            x_tm1_fake = sample_posterior(diffusion, x0_pred, x_t, t, noise.noise_posterior)
        # bf16 would put an error of several per cent into the penalty, so D sees the reals in float32 on R1 steps.
        with nullcontext() if with_r1 else players.autocast(batch.x0):
            logits_real = D(x_tm1.requires_grad_(with_r1), x_t, t)
        with players.autocast(batch.x0):
            logits_fake = D(x_tm1_fake, x_t, t)
        loss_real, loss_fake = real_loss(logits_real), fake_loss(logits_fake)
        loss = loss_real + loss_fake
        statistics = {"loss_d_real": loss_real, "loss_d_fake": loss_fake}
        if with_r1:
            penalty = r1_penalty(logits_real, x_tm1)
            loss = loss + 0.5 * players.r1_gamma * penalty
            statistics |= {"r1_penalty": penalty, "r1_steps": torch.ones_like(penalty)}
        players.discriminator.backward(loss * (batch.share * players.world_size))
        players.discriminator.step(measure_norm=measure_norm)
        statistics |= _logits_by_timestep(diffusion.num_timesteps, t, logits_real, logits_fake)
        _add(total, statistics, batch.share)
    return total


def update_generator(
    players: Players, micro_batches: Sequence[MicroBatch], *, measure_norm: bool = False
) -> Statistics:
    """One update of G, through a discriminator whose parameters stand still."""
    G, D, diffusion = players.generator.module, players.discriminator.module, players.diffusion
    total: Statistics = {}
    with _frozen(D):
        for batch in micro_batches:
            noise, t = batch.noise_g, batch.noise_g.t
            with players.autocast(batch.x0):
                _, x_t = forward_pair(diffusion, batch.x0, t, noise.noise_tm1, noise.noise_t)
                x0_pred = G(x_t, t, noise.z).float()
                x_tm1_fake = sample_posterior(diffusion, x0_pred, x_t, t, noise.noise_posterior)
                logits = D(x_tm1_fake, x_t, t)
            loss = generator_loss(logits)
            players.generator.backward(loss * (batch.share * players.world_size))
            players.generator.step(measure_norm=measure_norm)
            _add(total, {"loss_g": loss}, batch.share)
    return total


def draw_micro_batch(x0: Image, draws: Draws, *, num_timesteps: int, latent_dim: int, share: float) -> MicroBatch:
    """A micro-batch with the draws of both updates, a pure function of (seed, step, sample)."""
    image_shape = tuple(x0.shape[1:])

    def noise(t: Purpose, tm1: Purpose, t_noise: Purpose, z: Purpose, posterior: Purpose) -> Noise:
        return Noise(
            t=draws.integers(t, num_timesteps),
            noise_tm1=draws.normals(tm1, image_shape),
            noise_t=draws.normals(t_noise, image_shape),
            z=draws.normals(z, (latent_dim,)),
            noise_posterior=draws.normals(posterior, image_shape),
        )

    p = Purpose
    return MicroBatch(
        x0=x0,
        noise_d=noise(p.D_TIMESTEP, p.D_NOISE_TM1, p.D_NOISE_T, p.D_LATENT, p.D_NOISE_POSTERIOR),
        noise_g=noise(p.G_TIMESTEP, p.G_NOISE_TM1, p.G_NOISE_T, p.G_LATENT, p.G_NOISE_POSTERIOR),
        share=share,
    )


@contextmanager
def _frozen(module: torch.nn.Module):
    """No gradient for the parameters of `module`, so that none is computed and no engine hook fires for them."""
    for p in module.parameters():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in module.parameters():
            p.requires_grad_(True)


def _logits_by_timestep(
    num_timesteps: int, t: Timestep, real: Float[Tensor, "b"], fake: Float[Tensor, "b"]
) -> Statistics:
    """Sums of D's logits per timestep over the micro-batch, divided by its size, and the timesteps' frequencies."""
    zeros = torch.zeros(num_timesteps, device=t.device)
    return {
        name: zeros.index_add(0, t, values.detach().float()) / len(t)
        for name, values in (("logits_real", real), ("logits_fake", fake), ("frequency_t", torch.ones_like(real)))
    }


def _add(total: Statistics, statistics: Statistics, share: float) -> None:
    for name, value in statistics.items():
        weighted = value.detach().float() * share
        total[name] = total[name] + weighted if name in total else weighted
