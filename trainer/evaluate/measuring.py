"""The command with a network: samples of a file or of checkpoints, measured on all ranks that torchrun started."""

import argparse
import itertools
import json
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.storage.arguments import ranges_of_whole_numbers, whole_numbers
from data.storage.errors import UserError
from models.shapes import Uint8Image
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.retention import Choice, checkpoint_argument, steps_of
from trainer.checkpoint.snapshot import is_snapshot
from trainer.checkpoint.storage import storage_of_run
from trainer.config.command_line import check_group
from trainer.engine.ranks import Ranks
from trainer.evaluate.card import differences, make_card, read_card, weights_sha256, write_card
from trainer.evaluate.judges import open_network
from trainer.evaluate.kept import keep_beside, statistics_file
from trainer.evaluate.neighbours import Neighbours, draw_neighbours, find_neighbours
from trainer.evaluate.networks.features import FeatureNetwork, Seen
from trainer.evaluate.quality import Features, Statistics
from trainer.evaluate.reference import (
    BATCH_SIZE,
    Measured,
    Numbered,
    Reference,
    check_infinity,
    is_prepared,
    load_reference,
    measure,
    pairs_of,
    pick_images,
    pixels_sha256,
    see_samples,
)
from trainer.evaluate.report import render_checkpoints, render_measured
from trainer.sample.conditions import compared, given_pairs
from trainer.sample.draw import Loaded, images_at_once, load_checkpoint, load_run, sample_batches
from trainer.sample.fidelity import Fidelity
from trainer.sample.images import open_images

TIMEOUT_S = 3600
"""How long a rank waits for the others, which may sample more slowly."""
ALL = "all"


def checkpoints_argument(text: str) -> str | list[Choice]:
    """For argparse: `all`, `latest`, `best`, or steps such as 100,200."""
    if text == ALL:
        return text
    try:
        return [checkpoint_argument(text)] if text in ("latest", "best") else [*sorted(set(whole_numbers(text)))]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is given, allowed are {ALL}, latest, best, and steps such as 100,200"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, and of which weights or images."""

    step: int | None
    """Step of the checkpoint; None: samples from a file, or of a snapshot."""
    images: int | None
    """Training images up to this step."""
    sha256: str
    """Of the averaged weights, or of the given images."""
    measured: Measured
    """Figures."""


def evaluate_with_network(options: argparse.Namespace) -> int:
    """Measure what the options of the command name, in the features of `options.network`; rank 0 prints."""
    results: list[Result] = []
    network = reference = neighbours = closeness = None
    fidelity = Fidelity()  # of the last samples; with --checkpoints it is not shown
    with _ranks() as (ranks, device):
        for samples in open_samples(options, device, ranks):
            if network is None or reference is None:  # only now: a run that is missing costs no download of weights
                network = open_network(options.network, options.reference, seed=options.seed, device=device)
                reference = _load_reference(options, network, ranks)
            if options.infinity:
                check_infinity(samples.num, reference)
            seen = see_samples(samples.batches(ranks), network, ranks, codec=options.through)
            measured = measure(
                seen, reference, network, codec=options.through, seed=options.seed, infinity=options.infinity
            )
            results.append(
                Result(step=samples.step, images=samples.images_seen, sha256=samples.sha256(), measured=measured)
            )
            if isinstance(samples, DrawnSamples):
                states = [samples.fidelity.state()] if ranks is None else ranks.gather(samples.fidelity.state())
                fidelity = Fidelity.joined(states)
                if samples.translates and pairs_of(options.reference) and isinstance(reference.seen, Seen):
                    closeness = pair_distance(seen.features, reference.seen.features)
            if options.neighbours is not None and (ranks is None or ranks.rank == 0):
                neighbours = _neighbours(options, seen, reference, samples)
    if ranks is not None and ranks.rank != 0:
        return 0
    assert network is not None and reference is not None  # there is a result, or an error was raised
    sys.stdout.write(_shown(results, source_of(options), options, neighbours, fidelity, closeness) + "\n")
    rows = [(r.step, r.images, r.sha256, r.measured) for r in results]
    card = make_card(options, rows, reference, network, device)
    if options.card is not None:
        write_card(options.card, card)
        sys.stderr.write(f"trainer.evaluate: the card is {options.card}\n")
    if options.check is None:
        return 0
    lines = differences(read_card(options.check), card)
    for line in lines or ["the same figures, of the same weights or samples, reference and network"]:
        sys.stderr.write(f"trainer.evaluate: {options.check}: {line}\n")
    return 1 if lines else 0


def pair_distance(samples: Features, images: Features) -> float:
    """How far samples are from the images of their pairs, as a share of how far they are from those of the next pairs.

    Args:
        samples: features of the samples [N, d]; sample i is drawn for pair i % M.
        images: features of the images of the pairs [M, d].

    Returns:
        The mean distance, divided by that to the next pair: 0 for equal images, about 1 if the condition has no effect.
    """
    own, others = (images[(torch.arange(len(samples)) + shift) % len(images)] for shift in (0, 1))
    mean, of_others = ((samples - x).double().norm(dim=1).mean().item() for x in (own, others))
    return mean / of_others if of_others else 0.0


def measure_pairs(options: argparse.Namespace) -> int:
    """PSNR and SSIM of the samples of a run that translates, of the pairs of the reference; rank 0 prints.

    Raises:
        UserError: the run does not translate.
    """
    with _ranks() as (ranks, device):
        (samples,) = open_samples(options, device, ranks)
        if not isinstance(samples, DrawnSamples) or not samples.translates:
            raise UserError(
                f"{options.run} was not trained on pairs, so that its samples have no PSNR: give a --network"
            )
        for _ in samples.batches(ranks):
            pass
        states = [samples.fidelity.state()] if ranks is None else ranks.gather(samples.fidelity.state())
        fidelity = Fidelity.joined(states)
    if ranks is not None and ranks.rank != 0:
        return 0
    figures = {**fidelity.named(), "num_samples": fidelity.num_images, "source": source_of(options)}
    sys.stdout.write((json.dumps(figures, indent=2) if options.json else fidelity.table()) + "\n")
    return 0


def keep_reference(options: argparse.Namespace) -> int:
    """Keep the features of a prepared data set beside it; all ranks compute them, rank 0 writes."""
    if not is_prepared(options.reference):
        raise UserError(
            f"{options.reference} is no prepared data set: --statistics keeps the statistics of one in its folder"
        )
    with _ranks() as (ranks, device):
        network = open_network(options.network, options.reference, seed=options.seed, device=device)
        reference = load_reference(options.reference, network, ranks, options.cache)
    if ranks is not None and ranks.rank != 0:
        return 0
    if reference.is_beside:
        file, done = statistics_file(options.reference, network), "are there already"
    else:
        assert isinstance(reference.seen, Seen)  # a prepared data set holds images
        file, done = keep_beside(options.reference, reference.key, network, reference.seen.features), "were written"
    sys.stdout.write(f"{file}: statistics of {reference.num_images} images by {network.name} {done}\n")
    return 0


def _load_reference(options: argparse.Namespace, network: FeatureNetwork, ranks: Ranks | None) -> Reference:
    """The reference; a line says so if its features were kept beside it."""
    reference = load_reference(options.reference, network, ranks, options.cache)
    if reference.is_beside:
        file = statistics_file(options.reference, network)
        sys.stderr.write(f"trainer.evaluate: the features of the reference are those in {file}\n")
    return reference


def source_of(options: argparse.Namespace) -> str:
    """Where the samples are from, in a phrase."""
    form = " (PNG files)" if options.run is None and options.samples.is_dir() else ""
    return f"from {options.run or options.samples}{form}"


def _neighbours(
    options: argparse.Namespace, seen: Seen, reference: Reference, samples: "GivenSamples | DrawnSamples"
) -> Neighbours:
    """Nearest reference images, and their picture."""
    if isinstance(reference.seen, Statistics):
        raise UserError(f"--neighbours needs images to compare with, {options.reference} holds only statistics")
    found = find_neighbours(seen.features, reference.seen.features)
    draw_neighbours(options.neighbours, found, samples.pick, partial(pick_images, options.reference))
    sys.stderr.write(f"trainer.evaluate: the picture is {options.neighbours}\n")
    return found


def _shown(
    results: Sequence[Result],
    source: str,
    options: argparse.Namespace,
    neighbours: Neighbours | None,
    fidelity: Fidelity,
    closeness: float | None,
) -> str:
    """The results as a table or as JSON."""
    of_pairs = {} if closeness is None else {"pair_distance": closeness}
    if options.checkpoints is None:
        measured = results[0].measured
        if not options.json:
            lines = [render_measured(measured, source=source), *(neighbours.lines() if neighbours else [])]
            lines += ["", fidelity.table()] if fidelity.num_images else []
            lines += [
                f"{'feature distance to its image':<34}{x:>10.3f}  (1: as to that of another)"
                for x in of_pairs.values()
            ]
            return "\n".join(lines)
        figures = measured.figures | (neighbours.figures() if neighbours else {}) | fidelity.named() | of_pairs
        return json.dumps(figures | _conditions(measured) | {"source": source, "seed": options.seed}, indent=2)
    if not options.json:
        rows = [(result.step, result.images, result.measured) for result in results]
        return render_checkpoints(rows, source=source)
    rows = [{"step": r.step, "images": r.images, "weights_sha256": r.sha256} | r.measured.figures for r in results]
    shared = _conditions(results[0].measured) | {"source": source, "seed": options.seed}
    return json.dumps(shared | {"checkpoints": rows}, indent=2)


def _conditions(measured: Measured) -> dict[str, int | str]:
    """What the figures were measured on."""
    return {
        "num_samples": measured.num_samples,
        "num_reference": measured.num_reference,
        "network": measured.network,
        "judge": measured.judge,
        "through": measured.through,
    }


class GivenSamples:
    """Samples from a file or folder, read batch by batch: they never are in memory all at once."""

    step: int | None = None
    images_seen: int | None = None

    def __init__(self, path: Path) -> None:
        """Look at their form. Raises UserError if there are none."""
        self._path, self._images = path, open_images(path)
        self.num = self._images.num

    def sha256(self) -> str:
        """Of the pixels."""
        return pixels_sha256(self._images)

    def batches(self, ranks: Ranks | None) -> Numbered:
        """This rank's batches with their numbers over all ranks."""
        rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        return itertools.islice(enumerate(self._images.batches(BATCH_SIZE)), rank, None, world_size)

    def pick(self, numbers: Sequence[int]) -> Uint8Image:
        """Some of them, uint8 [N, C, H, W]."""
        return pick_images(self._path, numbers)


class DrawnSamples:
    """Samples drawn from a generator, batch by batch: they never are in memory all at once."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        num: int,
        seed: int,
        seeds: Sequence[int] | None = None,
        pairs: Path | str | None = None,
        step: int | None = None,
        images_seen: int | None = None,
    ) -> None:
        """Args:
        loaded: from `load_run`.
        num: number of samples.
        seed: of their noise.
        seeds: of each of them, in place of `seed`.
        pairs: data set of the pairs that a model which translates draws for; None: that of its run.
        step: of the checkpoint, if it is one.
        images_seen: training images up to there.
        """
        self.step, self.images_seen = step, images_seen
        self._loaded, self.num, self._seed, self._seeds, self._pairs = loaded, num, seed, seeds, pairs
        self.fidelity = Fidelity()

    @property
    def translates(self) -> bool:
        """Whether they are drawn for pairs."""
        return self._loaded[2].data.condition_channels > 0

    def sha256(self) -> str:
        """Of the weights."""
        return weights_sha256(self._loaded[0].state_dict())

    def batches(self, ranks: Ranks | None) -> Numbered:
        """This rank's batches with their numbers over all ranks."""
        rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        self.fidelity = Fidelity()
        drawn = self._drawn(rank, world_size, self.fidelity)
        return zip(itertools.count(rank, world_size), drawn, strict=False)

    def pick(self, numbers: Sequence[int]) -> Uint8Image:
        """Some of them, uint8 [N, C, H, W]; their batches are drawn again."""
        size = images_at_once(self._loaded[2].data.image_size)
        batches = {batch: next(self._drawn(batch, self.num)) for batch in {number // size for number in numbers}}
        return torch.stack([batches[number // size][number % size] for number in numbers])

    def _drawn(self, rank: int, world_size: int, fidelity: Fidelity | None = None) -> Iterator[Uint8Image]:
        config, place = self._loaded[2], {"rank": rank, "world_size": world_size}
        with given_pairs(config, self._pairs) as given:
            drawn = sample_batches(*self._loaded, num=self.num, seed=self._seed, seeds=self._seeds, **place, **given)
            size = images_at_once(config.data.image_size)
            yield from compared(drawn, given, fidelity or Fidelity(), batch_size=size, **place)


def open_samples(
    options: argparse.Namespace, device: str, ranks: Ranks | None
) -> Iterator[GivenSamples | DrawnSamples]:
    """The samples that the options name: of a file, or of one or several checkpoints, one after another. A collective.

    All ranks take the same checkpoints, though the run may go on meanwhile. With `all`, a damaged checkpoint is left
    out, with a line on stderr.

    Raises:
        UserError: the file or folder cannot be read.
        CheckpointError: a checkpoint that is named does not exist or is damaged, or there is none.
    """
    if options.run is None:
        yield GivenSamples(options.samples)
        return
    seeds = options.seeds and ranges_of_whole_numbers(options.seeds)
    draw = {"num": options.num, "seed": options.seed, "seeds": seeds, "pairs": pairs_of(options.reference)}
    if is_snapshot(options.run):
        if options.checkpoints is not None:
            raise UserError(f"{options.run} is one snapshot and has no checkpoints: leave --checkpoints out")
        yield DrawnSamples(load_run(options.run, options.checkpoint, device, options.weights), **draw)
        return
    # Their host's copies belong to the ranks of this command alone.
    storage = storage_of_run(options.run, owner=ranks.broadcast(uuid.uuid4().hex[:8]) if ranks else None)
    choices: Iterable[Choice] = options.checkpoints or [options.checkpoint or "latest"]
    if options.checkpoints == ALL:
        choices = steps_of(storage, ranks)
    found = 0
    for choice in choices:
        try:
            loaded, checkpoint = load_checkpoint(storage, choice, device, options.weights, ranks)
        except CheckpointError as error:
            if options.checkpoints != ALL:
                raise
            if ranks is None or ranks.rank == 0:
                sys.stderr.write(f"trainer.evaluate: step {choice} is left out: {error}\n")
            continue
        found += 1
        images = checkpoint.manifest.get("images")
        yield DrawnSamples(loaded, **draw, step=checkpoint.step, images_seen=images)
    if not found:
        raise CheckpointError(f"{options.run} has no valid checkpoint")


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
