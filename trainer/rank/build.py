"""Builds everything that learns: the networks in their engines, the average, and the guard over their updates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion
from models.fused.operator import fuse
from models.networks import build_discriminator
from trainer.algorithm.ema import Ema
from trainer.algorithm.method import Method, Part, Players
from trainer.algorithm.methods import make_method
from trainer.algorithm.randomness import fold_seed
from trainer.algorithm.statistics import Statistic
from trainer.checkpoint.snapshot import build_generator, load_initial_weights
from trainer.config.train_config import TrainConfig, split_batch
from trainer.engine.compile_cache import CompileCache
from trainer.engine.compiled import CompiledForward, compiled_forward
from trainer.engine.interface import Engine
from trainer.engine.plain import make_adam
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine
from trainer.rank.divergence import SkippedUpdates


@dataclass(frozen=True)
class Learner:
    """The objects that a training step changes.

    Attributes:
        method: the training method.
        players: the networks in their engines.
        ema: the averaged generator.
        skipped: counts skipped updates.
    """

    method: Method[Any]
    players: Players
    ema: Ema
    skipped: SkippedUpdates

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """All statistics of a step."""
        return (*self.method.statistics, *self.skipped.statistics)

    def generator_buffers(self) -> dict[str, Tensor]:
        """What the generator's state holds in addition to parameters, such as fixed random frequencies."""
        module = self.players.generator.module
        parameters = dict(module.named_parameters())
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def averaged_generator(self) -> dict[str, Tensor]:
        """The averaged generator's whole state. At ZeRO stage 3 this is a collective that every rank must call."""
        return self.generator_buffers() | self.ema.full_state()

    def close(self) -> None:
        """Release the engines."""
        for engine in self.players.engines.values():
            engine.close()


def build(config: TrainConfig, ranks: Ranks, *, fresh: bool = True) -> Learner:
    """Build what a config describes, with new weights.

    Args:
        config: the run's config.
        ranks: the ranks that train; each builds the same weights.
        fresh: load the weights of `run.init_from`; false if a checkpoint will be loaded afterwards.

    Raises:
        WeightsError: the weights of `run.init_from` cannot be used.
    """
    device, training = ranks.device, config.training
    method = make_method(training, config.generator)
    fuse("gpu" if config.engine.fused else "nowhere")
    # The same seed on all ranks: each builds the same weights, so none have to be sent.
    torch.manual_seed(fold_seed(config.run.seed, 1))
    networks: dict[Part, nn.Module] = {"g": build_generator(config)}
    if "d" in method.parts:
        networks["d"] = build_discriminator(config.discriminator, config.image_form)
    if config.run.init_from and fresh:
        load_initial_weights(networks["g"], Path(config.run.init_from))
    stages: dict[Part, int] = {"g": config.engine.zero_stage_g, "d": config.engine.zero_stage_d}
    engines: dict[Part, Engine] = {
        part: make_engine(
            network,
            make_adam(network.to(device), training.adam, device),
            config.engine,
            zero_stage=stages[part],
            grad_accum_steps=split_batch(config).grad_accum_steps,
            max_gradient_norm=config.guard.max_gradient_norm,
        )
        for part, network in networks.items()
    }
    compiled: dict[Part, CompiledForward | None] = {}
    if config.engine.compile and not config.run.deterministic:
        cache = CompileCache(config.engine.compile_cache, device)
        compiled = {
            part: compiled_forward(engine.module, cache, zero_stage=stages[part]) for part, engine in engines.items()
        }
    players = Players(
        engines,
        Diffusion.from_config(config.diffusion, device),
        world_size=ranks.world_size,
        bf16=training.precision == "bf16",
        compiled={part: forward for part, forward in compiled.items() if forward},
    )
    skipped = SkippedUpdates(config.guard, device, method.parts, method.statistics, ranks.world_size)
    return Learner(method, players, Ema(players.generator, training.ema_decay), skipped)
