"""D's update as the authors of the paper run it, to be compared with ours: `trainer.bench --compare-authors-update`.

Their loss of the generated pairs is backpropagated through G as well, and G's gradient is thrown away: an iteration
costs 6 forward passes' worth of G work where 4 are enough. What D learns is the same.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch

from models.diffusion import sample_posterior
from models.dropout import masks_from
from trainer.algorithm.losses import gradient_penalty
from trainer.algorithm.pairs import MicroBatch
from trainer.algorithm.step import Players, Statistics, add_statistics, by_timestep


def update_discriminator_through_generator(
    players: Players, micro_batches: Sequence[MicroBatch], *, with_r1: bool, with_r2: bool = False
) -> Statistics:
    """As `step.update_discriminator`, in float32 and over the plain torch engines alone.

    Args:
        players: the networks.
        micro_batches: as many as the engines accumulate.
        with_r1: add the R1 penalty on the real x_tm1.
        with_r2: they have none; it must be False.
    """
    assert not with_r2 and not players.bf16
    G, D, num_timesteps = players.generator.module, players.discriminator.module, players.diffusion.num_timesteps
    total: Statistics = {}
    for batch in micro_batches:
        pair, t, x_t = batch.pair_d, batch.pair_d.t, batch.pair_d.x_t
        with masks_from(G, pair.dropout):
            x0_pred = G(x_t, t, pair.z, pair.label)
        x_tm1_fake = sample_posterior(players.diffusion, x0_pred, x_t, t, pair.noise_posterior)
        x_tm1 = pair.x_tm1.detach().requires_grad_(with_r1)
        logits_real, logits_fake = D(x_tm1, x_t, t, pair.label), D(x_tm1_fake, x_t, t, pair.label)
        statistics = players.objective.discriminator(logits_real, logits_fake)
        loss = reduce(add, statistics.values())
        if with_r1:
            loss = loss + 0.5 * players.r1_gamma * gradient_penalty(logits_real, x_tm1)
        players.discriminator.backward(loss * (batch.share * players.world_size))
        players.discriminator.step()
        of_each = {"logits_real": logits_real, "logits_fake": logits_fake, "frequency_t": torch.ones_like(logits_real)}
        statistics |= {name: by_timestep(num_timesteps, t, values) for name, values in of_each.items()}
        add_statistics(total, statistics, batch.share)
    for p in G.parameters():
        p.grad = None
    return total
