"""Builds everything that learns: the networks in their engines, the average, and the guard over their updates."""

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion
from models.fused.operator import fuse
from models.generator import Generator
from models.layers import recompute_blocks
from models.networks.build import build_discriminator, shared_with_encoder
from trainer.algorithm.augmentation import AdaptiveProbability
from trainer.algorithm.auxiliary import GradientScale
from trainer.algorithm.ema import AVERAGE, Ema
from trainer.algorithm.method import PART_NAMES, Method, Part, Players
from trainer.algorithm.methods import make_method
from trainer.algorithm.randomness import fold_seed
from trainer.algorithm.statistics import Statistic
from trainer.checkpoint.snapshot import (
    DISCRIMINATOR,
    WEIGHTS,
    WeightsError,
    build_generator,
    is_snapshot,
    knows_no_latent,
    load_initial_weights,
    load_matching,
    trains_with_latent,
)
from trainer.checkpoint.storage import fetch_for_ranks, find_checkpoint, forget_for_ranks, storage_of_run
from trainer.checkpoint.whole import trained_discriminator, trained_generator
from trainer.config.train_config import TrainConfig, split_batch
from trainer.engine.compile_cache import CompileCache
from trainer.engine.compiled import CompiledForward, compiled_forward
from trainer.engine.frozen import freeze, learning
from trainer.engine.interface import Engine
from trainer.engine.plain import make_adam
from trainer.engine.precision import PRECISIONS, allow_tf32, best_precision
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine
from trainer.rank.divergence import SkippedUpdates
from trainer.rank.step.graphs import Recorder, recorder_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """The objects that a training step changes.

    Attributes:
        method: the training method.
        players: the networks in their engines.
        ema: the averaged generator.
        skipped: counts skipped updates.
        recorder: records updates; None: each is made anew.
    """

    method: Method[Any]
    players: Players
    ema: Ema
    skipped: SkippedUpdates
    recorder: Recorder | None = None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """All statistics of a step."""
        return (*self.method.statistics, *self.skipped.statistics)

    def generator_buffers(self) -> dict[str, Tensor]:
        """What the generator's state holds in addition to parameters, such as fixed random frequencies."""
        module = self.players.generator.module
        parameters = dict(module.named_parameters())
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def averaged_generator(self, state: str = AVERAGE) -> dict[str, Tensor]:
        """The averaged generator's whole state. At ZeRO stage 3 this is a collective that every rank must call.

        Args:
            state: which average, by its name in checkpoints.
        """
        return self.generator_buffers() | self.ema.full_state(state)

    def close(self) -> None:
        """Release the engines."""
        for engine in self.players.engines.values():
            engine.close()


def settle_precision(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Settle `training.precision: auto` by the ranks' devices, and set this process's number formats. A collective.

    Returns:
        The config with a precision that every rank's device has.
    """
    training = config.training
    if training.precision == "auto":
        of_ranks = ranks.gather(best_precision(ranks.device))
        training = replace(training, precision=min(of_ranks, key=PRECISIONS.index))
        if ranks.rank == 0:
            gpu = ranks.device.type == "cuda"
            device = torch.cuda.get_device_name(ranks.device) if gpu else "the CPU"
            log.info("training.precision auto is %s on %s", training.precision, device)
    allow_tf32(training.precision != "fp32")
    return replace(config, training=training)


def memory_format_of(device: torch.device) -> torch.memory_format:
    """The layout of a step's images, features and weights.

    A GPU's tensor cores take channels_last: another layout is converted around each convolution. On a CPU it changes
    the order of sums, and with it R1 of the published discriminator, by more than its test allows.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def new_networks(config: TrainConfig) -> dict[Part, nn.Module]:
    """The networks that a config trains, on the CPU with new weights; the same for each call, on every rank."""
    torch.manual_seed(fold_seed(config.run.seed, 1))
    networks: dict[Part, nn.Module] = {"g": build_generator(config)}
    if "d" in make_method(config.training, config.generator).parts:
        networks["d"] = build_discriminator(config.discriminator, config.network_form)
    return networks


def silence_latent(networks: Mapping[Part, nn.Module], config: TrainConfig, ranks: Ranks) -> None:
    """If a game with a latent begins, let z have no effect at first: for a generator that was trained without it.

    Otherwise z moves every style at random, and the first steps of the game destroy what the generator has learned.

    Args:
        networks: of the game.
        config: of its stage.
        ranks: the ranks.
    """
    if not trains_with_latent(config):
        return
    cast("Generator", networks["g"]).mapping.silence_latent()
    if ranks.rank == 0:
        log.info("the generator was trained without z: the layer that z enters starts at zero, and learns from there")


def check_discriminator_start(config: TrainConfig) -> None:
    """Refuse a discriminator that is to start from a generator which has not learned anything yet.

    Args:
        config: of the first stage of a run that starts.

    Raises:
        WeightsError: so it is.
    """
    trains_one = "d" in make_method(config.training, config.generator).parts
    if config.discriminator.init_from and trains_one and not config.run.init_from:
        raise WeightsError(
            "discriminator.init_from is generator, but the generator starts with random weights: give run.init_from or "
            "a stage before, or set discriminator.init_from to null"
        )


def start_from_encoder(networks: Mapping[Part, nn.Module], config: TrainConfig, ranks: Ranks) -> None:
    """Give a discriminator of `discriminator.init_from` the convolutions of the trained generator's encoder."""
    if config.discriminator.init_from is None or "d" not in networks:
        return
    shared = shared_with_encoder(networks["d"], networks["g"])
    trained, own = networks["g"].state_dict(), dict(networks["d"].named_parameters())
    networks["d"].load_state_dict({name: trained[twin] for name, twin in shared.items()}, strict=False)
    if ranks.rank == 0:
        taken, held = (sum(own[name].numel() for name in names) for names in (shared, own))
        log.info(
            "the discriminator takes %d of its %d parameters, %.1f%% of their values, from the generator's encoder",
            *(len(shared), len(own), 100 * taken / held),
        )


def load_start(networks: Mapping[Part, nn.Module], config: TrainConfig, ranks: Ranks) -> None:
    """Load the weights that a run starts from, `run.init_from`: the generator's, and the discriminator's if it has one.

    Args:
        networks: of the run.
        config: of its first stage.
        ranks: the ranks, which all take the same checkpoint, though the run may go on.

    Raises:
        WeightsError: weights cannot be read, or are of other networks.
        CheckpointError: the run has no valid checkpoint, or a host cannot get it; on all ranks.
    """
    source, from_encoder = Path(config.run.init_from or ""), config.discriminator.init_from is not None
    judge = networks.get("d") if config.run.init_from_discriminator and not from_encoder else None
    if source.is_file() or is_snapshot(source):
        file = source if source.is_file() else source / WEIGHTS
        load_initial_weights(networks["g"], file)
        if judge is not None and (source / DISCRIMINATOR).is_file():
            with _advice_for_discriminator():
                load_initial_weights(judge, source / DISCRIMINATOR, "discriminator")
        unused = knows_no_latent(file)
    else:
        # Their host's copies belong to the ranks of this start alone.
        storage = storage_of_run(source, owner=ranks.broadcast(uuid.uuid4().hex[:8]))
        try:
            checkpoint = fetch_for_ranks(storage, lambda: find_checkpoint(storage, None), ranks)
            assert checkpoint is not None
            state, trained = trained_generator(checkpoint)
            judged = trained_discriminator(checkpoint)
        finally:
            forget_for_ranks(storage, ranks)
        load_matching(networks["g"], state, str(source), "generator")
        if judge is not None and judged is not None:
            with _advice_for_discriminator():
                load_matching(judge, judged, str(source), "discriminator")
        unused = not trains_with_latent(trained)
    start_from_encoder(networks, config, ranks)
    if unused:
        silence_latent(networks, config, ranks)


@contextmanager
def _advice_for_discriminator() -> Iterator[None]:
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{error}; or set run.init_from_discriminator to false for a new one") from error


def build(
    config: TrainConfig,
    ranks: Ranks,
    *,
    fresh: bool = True,
    memory_format: torch.memory_format | None = None,
    first_step: int = 0,
) -> Learner:
    """Build what a config describes, with new weights.

    Args:
        config: of a stage of the run, with a settled precision.
        ranks: the ranks that train; each builds the same weights.
        fresh: load the weights of `run.init_from`; false if the state is loaded afterwards.
        memory_format: layout of images, features and weights; None: `memory_format_of` the device.
        first_step: step of the run with which the stage begins.

    Raises:
        WeightsError: the weights of `run.init_from` cannot be used.
    """
    device, training = ranks.device, config.training
    method = make_method(training, config.generator).starting_at(first_step)
    if not config.generator.latent and ranks.rank == 0:
        log.info("generator.latent is false: the generator gets zeros instead of z")
    fuse("gpu" if config.engine.fused else "nowhere")
    networks = new_networks(config)
    if config.run.init_from and fresh:
        load_start(networks, config, ranks)
    for part, network in networks.items():
        freeze(network, PART_NAMES[part], training.freeze)
        learns, held = (sum(p.numel() for p in some) for some in (learning(network), network.parameters()))
        if learns < held and ranks.rank == 0:
            log.info("%.1f%% of the %s's parameters are frozen", 100 * (held - learns) / held, PART_NAMES[part])
        if config.engine.checkpoint_activations:
            recompute_blocks(network)
    recorder = recorder_for(device, ranks.world_size) if config.engine.cuda_graphs else None
    stages: dict[Part, int] = {"g": config.engine.zero_stage_g, "d": config.engine.zero_stage_d}
    engines: dict[Part, Engine] = {
        part: make_engine(
            network,
            make_adam(
                network.to(device),
                device,
                beta1=training.adam.beta1,
                eps=training.adam.eps,
                recorded=recorder is not None,
            ),
            config.engine,
            zero_stage=stages[part],
            grad_accum_steps=split_batch(config).grad_accum_steps,
            max_gradient_norm=config.guard.max_gradient_norm,
        )
        for part, network in networks.items()
    }
    memory_format = memory_format or memory_format_of(device)
    for part, engine in engines.items():
        # DeepSpeed takes weights in the plain layout only. From stage 1 on they stay views of its flat buffers in that
        # layout, and a GPU converts each weight, which is small next to the features, in each convolution.
        if stages[part] == 0:
            engine.module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    compiled: dict[Part, CompiledForward | None] = {}
    if config.engine.compile and not config.run.deterministic:
        cache = CompileCache(config.engine.compile_cache, device)
        compiled = {
            part: compiled_forward(engine.module, cache, zero_stage=stages[part]) for part, engine in engines.items()
        }
    adaptive = training.augmentation.adaptive if "d" in method.parts else None
    players = Players(
        engines,
        Diffusion.from_config(config.diffusion, device),
        world_size=ranks.world_size,
        bf16=training.precision == "bf16",
        compiled={part: forward for part, forward in compiled.items() if forward},
        memory_format=memory_format,
        augmentation=adaptive
        and AdaptiveProbability(adaptive, training.global_batch_size, device, ranks.sum_on_device),
        gradient_scale=GradientScale(device, ranks.sum_on_device)
        if training.gradient_normalization and "d" in method.parts
        else None,
        sees_x_t=config.discriminator.sees == "pair",
    )
    skipped = SkippedUpdates(config.guard, device, method.parts, method.statistics, ranks.world_size)
    return Learner(method, players, Ema(players.generator, training.power_ema.widths), skipped, recorder)
