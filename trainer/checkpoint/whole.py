"""A checkpoint as one state, whatever ranks and ZeRO stages wrote it: for conversion into one file, and for export."""

from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.format import Checkpoint, CheckpointError, rank_file
from trainer.checkpoint.part import HostMemory
from trainer.checkpoint.snapshot import build_generator, save_snapshot
from trainer.checkpoint.storage import CheckpointStorage
from trainer.checkpoint.writer import commit_parts
from trainer.config.io import from_dict
from trainer.config.train_config import TrainConfig

SECTIONS = ("generator", "discriminator", "ema")


def whole_states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every flattened state of every parameter, by its key in the files: "SECTION/STATE/PARAMETER".

    Raises:
        CheckpointError: a part of one is in none of the files.
    """
    states: dict[str, Tensor] = {}
    for name in SECTIONS:
        section = checkpoint.section(name)
        for key, numel in section.lengths().items():
            _, state, parameter = key.split("/", 2)
            states[key] = section.read(state, parameter, 0, numel)
    return states


def whole_extras(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The small tensors of all ranks as those of one, by key: sums are added up, the rest is the same on each."""
    together: dict[str, Tensor] = {}
    for rank in range(checkpoint.manifest["world_size"]):
        for key, value in checkpoint.all_extras(rank).items():
            if key.startswith("extra/statistics/"):
                together[key] = together[key] + value if key in together else value
            else:
                together.setdefault(key, value)
    return together


def convert(checkpoint: Checkpoint, target: CheckpointStorage) -> str:
    """Write a checkpoint as one of a single rank without ZeRO; all states stay as they are, bit for bit.

    Args:
        checkpoint: verified.
        target: another storage.

    Returns:
        Its name there.

    Raises:
        CheckpointError: it cannot be read whole, or there is one of that name.
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


def averaged_generator(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], TrainConfig]:
    """The state of the averaged generator, and the config that builds it.

    Args:
        checkpoint: verified.

    Raises:
        CheckpointError: the checkpoint is not of the networks of its config.
    """
    config = from_dict(checkpoint.manifest["config"], str(checkpoint.path))
    shapes = {name: p.shape for name, p in build_generator(config, "meta").named_parameters()}
    average = checkpoint.section("ema")
    state = {name: average.read("average", name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
    return state | checkpoint.extras("buffers", 0), config


def export(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the averaged generator as a snapshot: safetensors beside the config that builds it.

    Args:
        checkpoint: verified.
        folder: for the two files.

    Raises:
        CheckpointError: as `averaged_generator`.
    """
    state, config = averaged_generator(checkpoint)
    return save_snapshot(folder, state, config, checkpoint.step)
