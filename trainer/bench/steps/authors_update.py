"""D's update as the authors of the paper run it, for comparison with ours.

They also backpropagate the loss of the generated pairs through G and discard G's gradient: an iteration costs as much
as 6 forward passes of G where 4 are enough. D learns the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import Players, context_of, generated, judged, seen
from trainer.algorithm.pairs import MicroBatch
from trainer.algorithm.penalties import gradient_penalty
from trainer.algorithm.statistics import Statistics, add_statistics, logit_statistics


@dataclass(frozen=True)
class AuthorsAdversarial(Adversarial):
    """The game with the authors' update of D, only in float32 and with the plain torch engines."""

    def update_discriminator(
        self,
        players: Players,
        batches: Sequence[MicroBatch],
        *,
        r1_gamma: float = 0.0,
        r2_gamma: float = 0.0,
        weights: Mapping[str, float] | None = None,
    ) -> Statistics:
        """As in `Adversarial`, but with the graph through G; the authors have no R2."""
        assert not r2_gamma and not weights and not players.bf16
        total: Statistics = {}
        for batch in batches:
            pair = batch.pair_d
            _, x_tm1_fake = generated(players, pair)
            context = context_of(players, pair)
            x_tm1, logits_real, _ = judged(players, pair, pair.x_tm1.detach(), context, penalized=r1_gamma > 0)
            logits_fake = players.discriminator.module(seen(players, pair, x_tm1_fake), *context)
            statistics = self.objective.discriminator(logits_real, logits_fake)
            loss = reduce(add, statistics.values())
            if r1_gamma > 0:
                loss = loss + 0.5 * r1_gamma * gradient_penalty(logits_real, x_tm1)
            players.discriminator.backward(loss * (batch.share * players.world_size))
            players.discriminator.step()
            statistics |= logit_statistics(players.diffusion.num_timesteps, pair.t, logits_real, logits_fake)
            add_statistics(total, statistics, batch.share)
        for p in players.generator.module.parameters():
            p.grad = None
        return total
