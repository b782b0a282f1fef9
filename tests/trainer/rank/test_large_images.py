"""The configs for large images, at reduced width: one step of each stage, with recomputed blocks."""

import pytest
import torch

from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.randomness import Draws
from trainer.config.io import load_config
from trainer.config.stages import stages_of
from trainer.engine.ranks import Ranks
from trainer.rank.build import build, settle_precision

NARROW = (
    "generator.base_channels=4",
    "generator.latent_embedding_dim=8",
    "discriminator.base_channels=2",
    "discriminator.stddev_group_size=1",
    "training.global_batch_size=1",
    "scaling.world_size=1",
    "scaling.device=cpu",
    "engine.backend=torch",
    "engine.checkpoint_activations=true",
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 1024])
def test_a_step_of_the_game_reaches_every_parameter(size):
    stage = stages_of(load_config(f"celebahq{size}", NARROW))[-1]
    ranks = Ranks.join("cpu", 60)
    try:
        learner = build(settle_precision(stage.config, ranks), ranks)
        images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
        draws = Draws(0, 0, torch.arange(1))
        raw = RawBatch(images, draws, stage.config.generator.latent_dim, flip=True, share=1.0, domain="haar")
        batch = learner.method.draw(raw, learner.players.diffusion)
        for part in ("d", "g"):
            found = learner.method.update(part, learner.players, [batch], 0)
            assert all(torch.isfinite(value).all() for value in found.values())
        fragments = [f for engine in learner.players.engines.values() for f in engine.fragments()]
        assert not {f.name for f in fragments if not f.tensors["exp_avg"].any()}
        learner.close()
    finally:
        ranks.leave()
