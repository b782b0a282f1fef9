"""A checkpoint as one state, independent of the ranks and ZeRO stage that wrote it; for conversion and export."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.networks.build import build_discriminator, build_generator, without_values
from trainer.algorithm.methods import make_method
from trainer.checkpoint.format import Checkpoint, CheckpointError, rank_file
from trainer.checkpoint.part import HostMemory
from trainer.checkpoint.snapshot import save_snapshot
from trainer.checkpoint.storage import CheckpointStorage
from trainer.checkpoint.writer import commit_parts
from trainer.config.io import from_dict
from trainer.config.stages import stage_before
from trainer.config.train_config import TrainConfig

SECTIONS = ("generator", "discriminator", "ema")
Weights = Literal["average", "live"]
"""Of a generator: their moving average, which draws better images, or those that the optimizer changes."""


def whole_states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every flattened state of every parameter, by its key in the files: "SECTION/STATE/PARAMETER".

    Raises:
        CheckpointError: some elements are in none of the files.
    """
    states: dict[str, Tensor] = {}
    for name in SECTIONS:
        section = checkpoint.section(name)
        for key, numel in section.lengths().items():
            _, state, parameter = key.split("/", 2)
            states[key] = section.read(state, parameter, 0, numel)
    return states


def whole_extras(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The small tensors of all ranks combined into those of one, by key: sums are added, the rest is equal on all."""
    together: dict[str, Tensor] = {}
    for rank in range(checkpoint.manifest["world_size"]):
        for key, value in checkpoint.all_extras(rank).items():
            if key.startswith("extra/statistics/"):
                together[key] = _sum(key, together[key], value, checkpoint) if key in together else value
            else:
                together.setdefault(key, value)
    return together


def _sum(key: str, left: Tensor, right: Tensor, checkpoint: Checkpoint) -> Tensor:
    if left.shape != right.shape:
        raise CheckpointError(f"{checkpoint.path}: {key} differs in shape between its ranks")
    return left + right


def convert(checkpoint: Checkpoint, target: CheckpointStorage) -> str:
    """Write a checkpoint as one of a single rank without ZeRO; all states stay bitwise equal.

    Args:
        checkpoint: verified.
        target: another storage.

    Returns:
        Its name there.

    Raises:
        CheckpointError: it is incomplete, or the target has one of that name.
        OSError: the target cannot be written.
    """
    name = checkpoint.path.name
    if target.manifest(name) is not None:
        raise CheckpointError(f"{target.shown}/{name} exists already: choose another --out")
    states = whole_states(checkpoint)
    part = HostMemory(torch.device("cpu")).take_tensors(states | whole_extras(checkpoint), dict.fromkeys(states, "0"))
    stages = {"g": 0, "d": 0}
    kept = {key: value for key, value in checkpoint.manifest.items() if key not in ("world_size", "files")}
    commit_parts(target, name, {rank_file(0): part}, {**kept, "zero_stages": stages, "world_size": 1})
    return name


def trained_generator(checkpoint: Checkpoint, weights: Weights = "average") -> tuple[dict[str, Tensor], TrainConfig]:
    """The state of the generator, and the config that builds it: that of its stage.

    Args:
        checkpoint: verified.
        weights: which ones.

    Raises:
        CheckpointError: the checkpoint does not match the networks of its config.
    """
    config = config_of(checkpoint)
    with without_values():
        generator = build_generator(config.generator, config.network_form, config.noise_levels)
    state = _parameters(checkpoint, generator, *_SECTION[weights])
    buffers = {name: tensor for name, tensor in generator.state_dict().items() if name not in state}
    return state | checkpoint.buffers(buffers), config


def trained_discriminator(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The state of the discriminator, None if the checkpoint's stage trains none.

    Raises:
        CheckpointError: as in `trained_generator`.
    """
    config = config_of(checkpoint)
    if "d" not in make_method(config.training, config.generator).parts:
        return None
    with without_values():
        network = build_discriminator(config.discriminator, config.network_form)
    return _parameters(checkpoint, network, "discriminator", "parameter")


def config_of(checkpoint: Checkpoint) -> TrainConfig:
    """The config of the stage that ends with a checkpoint, or that it interrupts."""
    return stage_before(from_dict(checkpoint.manifest["config"], str(checkpoint.path)), checkpoint.step).config


_SECTION: dict[Weights, tuple[str, str]] = {"average": ("ema", "average"), "live": ("generator", "parameter")}
"""Section and state of a checkpoint that hold them."""


def _parameters(checkpoint: Checkpoint, network: nn.Module, section: str, state: str) -> dict[str, Tensor]:
    saved, shapes = checkpoint.section(section), {name: p.shape for name, p in network.named_parameters()}
    return {name: saved.read(state, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}


def export(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the averaged generator as a snapshot: safetensors, with the config that builds it.

    Args:
        checkpoint: verified.
        folder: for the two files.

    Raises:
        CheckpointError: as in `trained_generator`.
    """
    state, config = trained_generator(checkpoint)
    return save_snapshot(folder, state, config, checkpoint.step)
