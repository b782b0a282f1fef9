"""One training step on the CPU: of the published networks at full width, of those for large images at reduced width."""

import pytest
import torch

from models.diffusion import Diffusion
from models.networks.build import build_discriminator
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.ema import Ema
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import RawBatch, draw_micro_batch
from trainer.algorithm.randomness import Draws
from trainer.checkpoint.snapshot import build_generator
from trainer.config.io import load_config
from trainer.config.stages import stages_of
from trainer.engine.plain import TorchEngine, make_adam
from trainer.engine.ranks import Ranks
from trainer.rank.build import build, settle_precision

CPU = torch.device("cpu")
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
QUARTER = ("data.image_size=128", "generator.attention_resolutions=[8]")
"""A quarter of the pixels of 256 px with the same networks: as many levels, and attention at the same one."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sets", "million_parameters"), [("cifar10", (), 48.43), ("lsun256", QUARTER, 39.73)])
def test_a_step_at_full_width_reaches_every_parameter(name, sets, million_parameters):
    config = load_config(name, sets)
    torch.manual_seed(0)
    generator = build_generator(config)
    discriminator = build_discriminator(config.discriminator, config.image_form)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(million_parameters, abs=0.005)
    engines = []
    for network in (generator, discriminator):
        engine = TorchEngine(network, make_adam(network, CPU), 1, None)
        engine.set_rates(1e-4)
        engines.append(engine)
    players = Players({"g": engines[0], "d": engines[1]}, Diffusion.from_config(config.diffusion, CPU))
    game = Adversarial(r1_gamma=config.training.r1_gamma)
    size = config.data.image_size
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    draws = Draws(0, 0, torch.arange(1))
    raw = RawBatch(images, draws, latent_dim=config.generator.latent_dim, flip=True, share=1.0)
    micro_batch = draw_micro_batch(raw, players.diffusion)
    statistics = game.update("d", players, [micro_batch], 0) | game.update("g", players, [micro_batch], 0)
    Ema(engines[0]).update(0, config.training.ema_decay)

    assert all(torch.isfinite(value).all() for value in statistics.values())
    for engine in engines:  # Adam's first moment: the layers behind the near-zero ones move less than float32 resolves
        parameters = engine.module.named_parameters()
        assert not [name for name, p in parameters if not engine.optimizer.state[p]["exp_avg"].any()]


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
