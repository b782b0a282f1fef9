"""One discriminator update and one generator update: the whole algorithm (arXiv 2112.07804, section 4 and appendix).

The engines decide how gradients are reduced and parameters updated; this file decides what is computed. It draws no
random number and reads no scalar off the device: pairs come in drawn, sums of statistics go out as tensors.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from models.diffusion import Diffusion, sample_posterior
from models.dropout import masks_from
from models.shapes import Image, Timestep
from trainer.algorithm.losses import OBJECTIVES, Objective, gradient_penalty
from trainer.algorithm.pairs import MicroBatch
from trainer.engine.interface import Engine


@dataclass(frozen=True)
class Players:
    """The two networks in their engines, and what both updates need.

    Attributes:
        generator, discriminator: the engines.
        diffusion: tables of the forward process and its posterior, on the device.
        r1_gamma, r2_gamma: weights of R1 and R2; half of each multiplies the squared gradient norm.
        objective: the adversarial game.
        world_size: number of ranks over which the engines average gradients.
        bf16: compute in bfloat16 except R1, R2 and the losses.
        compiled_g, compiled_d: compiled forward passes of the engines' modules, or None.
    """

    generator: Engine
    discriminator: Engine
    diffusion: Diffusion
    r1_gamma: float
    r2_gamma: float = 0.0
    objective: Objective = OBJECTIVES["non_saturating"]
    world_size: int = 1
    bf16: bool = False
    compiled_g: Callable[..., Tensor] | None = None
    compiled_d: Callable[..., Tensor] | None = None

    @property
    def forward_g(self) -> Callable[..., Tensor]:
        """The generator's forward pass, the compiled one if there is one."""
        return self.compiled_g or self.generator.module

    @property
    def forward_d(self) -> Callable[..., Tensor]:
        """The discriminator's, likewise; not for what is differentiated twice."""
        return self.compiled_d or self.discriminator.module

    def autocast(self, x_t: Image) -> AbstractContextManager:
        """The region of low-precision compute. Engines are bypassed in the forward pass, so it is opened here."""
        return torch.autocast(x_t.device.type, torch.bfloat16) if self.bf16 else nullcontext()


Statistics = dict[str, Tensor]
"""Sums over micro-batches, each weighted by its share; summed over the ranks they are means over the global batch."""


def update_discriminator(
    players: Players, micro_batches: Sequence[MicroBatch], *, with_r1: bool, with_r2: bool = False
) -> Statistics:
    """One update of D: real pairs (x_tm1, x_t) against pairs whose x_tm1 comes from G and the posterior.

    Args:
        players: the networks.
        micro_batches: as many as the engines accumulate.
        with_r1: add the R1 penalty on the real x_tm1, in float32, without multiplying it by its interval.
        with_r2: the same for the generated x_tm1.
    """
    G, D, D_twice, diffusion = players.forward_g, players.forward_d, players.discriminator.module, players.diffusion
    total: Statistics = {}
    for batch in micro_batches:
        pair, t, x_t = batch.pair_d, batch.pair_d.t, batch.pair_d.x_t
        with torch.no_grad(), players.autocast(x_t), masks_from(players.generator.module, pair.dropout):
            x0_pred = G(x_t, t, pair.z, pair.label).to(x_t.dtype)
            x_tm1_fake = sample_posterior(diffusion, x0_pred, x_t, t, pair.noise_posterior)
        x_tm1 = pair.x_tm1.detach().requires_grad_(with_r1)
        x_tm1_fake.requires_grad_(with_r2)
        # bf16 would put an error of several per cent into a penalty: D sees what is penalized in float32.
        with nullcontext() if with_r1 else players.autocast(x_t):
            logits_real = (D_twice if with_r1 else D)(x_tm1, x_t, t, pair.label)
        with nullcontext() if with_r2 else players.autocast(x_t):
            logits_fake = (D_twice if with_r2 else D)(x_tm1_fake, x_t, t, pair.label)
        statistics = players.objective.discriminator(logits_real, logits_fake)
        loss = reduce(add, statistics.values())
        if with_r1:
            penalty = gradient_penalty(logits_real, x_tm1)
            loss = loss + 0.5 * players.r1_gamma * penalty
            statistics |= {"r1_penalty": penalty, "r1_steps": torch.ones_like(penalty)}
        if with_r2:
            penalty = gradient_penalty(logits_fake, x_tm1_fake)
            loss = loss + 0.5 * players.r2_gamma * penalty
            statistics |= {"r2_penalty": penalty, "r2_steps": torch.ones_like(penalty)}
        players.discriminator.backward(loss * (batch.share * players.world_size))
        players.discriminator.step()
        of_each = {"logits_real": logits_real, "logits_fake": logits_fake, "frequency_t": torch.ones_like(logits_real)}
        statistics |= {name: by_timestep(diffusion.num_timesteps, t, values) for name, values in of_each.items()}
        add_statistics(total, statistics, batch.share)
    return total


def update_generator(players: Players, micro_batches: Sequence[MicroBatch]) -> Statistics:
    """One update of G, through a discriminator whose parameters stand still."""
    G, D, diffusion = players.forward_g, players.forward_d, players.diffusion
    total: Statistics = {}
    with _frozen(players.discriminator.module):
        for batch in micro_batches:
            pair, t, x_t = batch.pair_g, batch.pair_g.t, batch.pair_g.x_t
            with players.autocast(x_t), masks_from(players.generator.module, pair.dropout):
                x0_pred = G(x_t, t, pair.z, pair.label).to(x_t.dtype)
                x_tm1_fake = sample_posterior(diffusion, x0_pred, x_t, t, pair.noise_posterior)
                logits = D(x_tm1_fake, x_t, t, pair.label)
            logits_real = None
            if players.objective.compares:
                with torch.no_grad(), players.autocast(x_t):
                    logits_real = D(pair.x_tm1, x_t, t, pair.label)
            loss = players.objective.generator(logits, logits_real)
            players.generator.backward(loss * (batch.share * players.world_size))
            players.generator.step()
            add_statistics(
                total, {"loss_g": loss, "logits_g": by_timestep(diffusion.num_timesteps, t, logits)}, batch.share
            )
    return total


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


def by_timestep(num_timesteps: int, t: Timestep, values: Float[Tensor, " b"]) -> Float[Tensor, " t"]:
    """Sums of `values` per timestep over the micro-batch, divided by its size; of ones, the timesteps' frequencies."""
    zeros = torch.zeros(num_timesteps, device=t.device)
    return zeros.index_add(0, t, values.detach().to(zeros.dtype)) / len(t)


def add_statistics(total: Statistics, statistics: Statistics, share: float) -> None:
    """Add a micro-batch's statistics to those of the ones before it, weighted by its share of the batch."""
    if share == 0:  # a micro-batch that only fills up
        return
    for name, value in statistics.items():
        weighted = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * share
        total[name] = total[name] + weighted if name in total else weighted
