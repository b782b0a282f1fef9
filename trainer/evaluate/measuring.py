"""The command with a network: samples from a run or a file, measured on all ranks that torchrun started."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from models.diffusion import Diffusion
from models.shapes import Uint8Image
from trainer.config.command_line import check_group
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.evaluate.judges import open_network
from trainer.evaluate.quality import named
from trainer.evaluate.reference import BATCH_SIZE, Measured, Numbered, evaluate_against, load_reference
from trainer.evaluate.report import render_measured
from trainer.sample.draw import load_run, sample_batches
from trainer.sample.images import load_images

TIMEOUT_S = 3600
"""How long a rank waits for the others, which may sample more slowly."""


def evaluate_with_network(options: argparse.Namespace) -> int:
    """Measure what the options of the command name, in the features of `options.network`; rank 0 prints."""
    with _ranks() as (ranks, device):
        network = open_network(options.network, options.reference, seed=options.seed, device=device)
        samples = open_samples(options, device)
        reference = load_reference(options.reference, network, ranks, options.cache)
        batches = samples.batches(ranks)
        measured = evaluate_against(batches, reference, network, ranks, codec=options.through, seed=options.seed)
    if ranks is None or ranks.rank == 0:
        fields = flat(measured) | {"source": samples.source, "seed": options.seed}
        text = json.dumps(fields, indent=2) if options.json else render_measured(measured, source=samples.source)
        sys.stdout.write(text + "\n")
    return 0


def flat(measured: Measured) -> dict[str, float | int | str | None]:
    """Figures by the names of their curves, and what they were measured on, for JSON."""
    return named(measured.quality, measured.judge) | {
        "num_samples": measured.num_samples,
        "num_reference": measured.num_reference,
        "network": measured.network,
        "judge": measured.judge,
        "through": measured.through,
    }


class GivenSamples:
    """Samples from a file or folder."""

    def __init__(self, path: Path) -> None:
        """Read them all. Raises UserError if there are none."""
        self.images = load_images(path)
        self.source = f"from {path}{' (PNG files)' if path.is_dir() else ''}"

    def batches(self, ranks: Ranks | None) -> Numbered:
        """This rank's batches with their numbers over all ranks."""
        rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        numbers = itertools.count(rank, world_size)
        return zip(numbers, self.images.split(BATCH_SIZE)[rank::world_size], strict=False)


class DrawnSamples:
    """Samples drawn from a run, batch by batch: they never are in memory all at once."""

    def __init__(self, source: str, loaded: tuple[nn.Module, Diffusion, TrainConfig], *, num: int, seed: int) -> None:
        """Args:
        source: where they come from, in a phrase.
        loaded: from `load_run`.
        num: number of samples.
        seed: of their noise.
        """
        self.source = source
        self._loaded, self._num, self._seed = loaded, num, seed

    def batches(self, ranks: Ranks | None) -> Numbered:
        """This rank's batches with their numbers over all ranks."""
        rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        return zip(itertools.count(rank, world_size), self._drawn(rank, world_size), strict=False)

    def _drawn(self, rank: int, world_size: int) -> Iterator[Uint8Image]:
        return sample_batches(*self._loaded, num=self._num, seed=self._seed, rank=rank, world_size=world_size)


def open_samples(options: argparse.Namespace, device: str) -> GivenSamples | DrawnSamples:
    """The samples that the options name.

    Raises:
        UserError: the file or folder cannot be read.
        CheckpointError: the run has no valid checkpoint.
    """
    if options.run is None:
        return GivenSamples(options.samples)
    loaded = load_run(options.run, None, device)
    return DrawnSamples(f"from {options.run}", loaded, num=options.num, seed=options.seed)


@contextmanager
def _ranks() -> Iterator[tuple[Ranks | None, str]]:
    """The group that torchrun started, or None for a process alone; and the device of this process."""
    ranks, device = None, "cuda" if torch.cuda.is_available() else "cpu"
    if check_group()[1] > 1:
        ranks = Ranks.join("gpu" if device == "cuda" else "cpu", TIMEOUT_S)
        device = str(ranks.device)
    try:
        yield ranks, device
    finally:
        if ranks is not None:
            ranks.leave()
