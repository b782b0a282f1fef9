"""The authors' update of D: the same gradient of D, and the work that is thrown away."""

from dataclasses import replace

import pytest
import torch

from models.diffusion import Diffusion, DiffusionConfig
from tests.trainer.engine.conformance_rank import CPU, PlainEngine, micro_batches, networks
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import Players
from trainer.algorithm.statistics import Statistics
from trainer.bench.steps.authors_update import AuthorsAdversarial
from trainer.config.io import load_config
from trainer.plan.cost import count_costs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ratio"), [("cifar10", 1.35), ("lsun256", 1.16)])
def test_an_iteration_costs_two_forwards_of_g_more(name, ratio):
    config = load_config(name, ["training.precision=fp32"])
    ours, theirs = (
        count_costs(config),
        count_costs(config, AuthorsAdversarial.of(config.training, config.generator)),
    )
    more = theirs.update_d.flops_per_image - ours.update_d.flops_per_image
    assert more == pytest.approx(2 * ours.forward_g, rel=0.01)
    without = [replace(costs, penalty_interval_steps=None).flops_per_image for costs in (theirs, ours)]
    assert without[0] / without[1] == pytest.approx(ratio, abs=0.01)
    assert theirs.update_g == ours.update_g


@pytest.mark.parametrize("r1_gamma", [0.0, 0.5])
def test_what_d_learns_is_the_same_and_g_keeps_no_gradient(r1_gamma):
    def learn(game: Adversarial) -> tuple[Players, Statistics]:
        generator, discriminator = networks()
        engine_g, engine_d = (
            PlainEngine(n, torch.optim.SGD(n.parameters(), lr=0.1))  # pyright: ignore[reportAbstractUsage]
            for n in (generator, discriminator)
        )
        diffusion = Diffusion.from_config(DiffusionConfig(), CPU)
        players = Players({"g": engine_g, "d": engine_d}, diffusion)
        return players, game.update_discriminator(players, micro_batches(0, 16, 16), r1_gamma=r1_gamma)

    (ours, our_statistics), (theirs, their_statistics) = map(
        learn, (Adversarial(r1_gamma=2.0), AuthorsAdversarial(r1_gamma=2.0))
    )
    for mine, other in zip(
        ours.discriminator.module.parameters(), theirs.discriminator.module.parameters(), strict=True
    ):
        torch.testing.assert_close(other, mine, atol=1e-6, rtol=0)  # sums in another order
    assert all(p.grad is None for p in theirs.generator.module.parameters())
    for name, value in their_statistics.items():
        torch.testing.assert_close(value, our_statistics[name], atol=1e-6, rtol=1e-5)
