"""How good samples are: `python -m trainer.evaluate --run DIR|--samples FILE --reference DIR [--network FILE.pt]`.

Measures samples against a reference: FID, KID, Inception score, precision, recall, density and coverage, in the
features of a TorchScript network; or, without one, of a classifier that is trained on the labelled reference in the
same run, and then with the distance of pure noise as well. Compare figures only for one data set, one network and equal
numbers of samples: the Fréchet distance of few samples is biased upwards. With --network, ranks share the work:
`torchrun --nproc-per-node 2 -m -- trainer.evaluate --run DIR ...` (torchrun would take --run for its own without `--`).
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args

import torch
from torch import Tensor

from data.shards.index import load_index
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from models.shapes import Uint8Image
from trainer.config.command_line import add_seed_argument, check_group
from trainer.engine.ranks import Ranks
from trainer.evaluate.classifier import NO_LABELS, evaluate_samples
from trainer.evaluate.features import Codec, ScriptedNetwork, through
from trainer.evaluate.picture import draw_picture
from trainer.evaluate.reference import BATCH_SIZE, Numbered, cache_folder, evaluate_against, load_reference, read_all
from trainer.evaluate.report import CODEC_WORDS, render, render_measured
from trainer.sample.draw import default_device, load_run, sample_batches, sample_images
from trainer.sample.images import load_images
from trainer.tracking.spool import read_curves

TIMEOUT_S = 3600
"""How long a rank waits for the others, which may sample more slowly."""


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@as_command(name="trainer.evaluate", failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line about what the user has to change."""
    parser = _Parser(
        prog="python -m trainer.evaluate", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--samples", type=path_argument, metavar="FILE.npz|FOLDER", help="uint8 images [N, H, W, C], or PNGs"
    )
    what.add_argument(
        "--run", type=path_argument, metavar="DIR", help="draw the samples from the newest checkpoint of a run"
    )
    parser.add_argument("--num", type=whole_number(2), default=500, help="samples to draw with --run (default: 500)")
    parser.add_argument(
        "--reference",
        type=path_argument,
        required=True,
        metavar="DIR|FILE.npz",
        help="prepared data set, labelled; with --network any one, PNGs, or .npz of images or of mu and sigma",
    )
    parser.add_argument(
        "--network",
        type=path_argument,
        metavar="FILE.pt",
        help="TorchScript whose features are taken (default: a small classifier, trained on the reference)",
    )
    parser.add_argument(
        "--through",
        choices=get_args(Codec),
        default="none",
        help="file format that the samples go through first; jpeg is what the authors of DDGAN did (default: none)",
    )
    parser.add_argument(
        "--cache", type=path_argument, default=cache_folder(), metavar="DIR", help="where references are kept"
    )
    add_seed_argument(parser, "of the classifier, noise, subsets and samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--picture",
        type=path_argument,
        metavar="FILE.png",
        help="draw real images, samples and the curves of the run; not with --network",
    )
    options = parser.parse_args(arguments)
    if options.picture is not None and (options.network is not None or options.picture.suffix != ".png"):
        parser.error("--picture takes a name that ends in .png, and cannot be given together with --network")
    if options.picture is not None and not options.picture.parent.is_dir():
        parser.error(
            f"--picture is {options.picture}, but there is no folder {options.picture.parent}: create it first"
        )
    if options.network is not None:
        return _evaluate_with(options)
    index = load_index(options.reference)
    if index.num_classes is None:  # reported before a large data set is read in vain
        raise UserError(f"{options.reference}: {NO_LABELS}")
    samples, source, asked = _samples(options, index.num_classes)
    samples = through(options.through)(samples)
    source += f", measured through {CODEC_WORDS[options.through]}"
    reference, labels = read_all(options.reference)
    evaluation = evaluate_samples(samples, reference, labels, options.seed, asked)
    if options.json:
        fields = dataclasses.asdict(evaluation) | {"ratio": evaluation.ratio, "source": source}
        text = json.dumps(fields, indent=2)
    else:
        text = render(evaluation, source=source, class_names=index.class_names)
    sys.stdout.write(text + "\n")
    if options.picture is not None:
        draw_picture(
            options.picture,
            real=(reference, labels),
            samples=(samples, asked),
            class_names=index.class_names or (),
            curves=read_curves(options.run) if options.run else {},
        )
        sys.stderr.write(f"trainer.evaluate: the picture is {options.picture}\n")
    return 0


def _evaluate_with(options: argparse.Namespace) -> int:
    """The command with a given network, on all ranks started by torchrun."""
    ranks = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if check_group()[1] > 1:
        ranks = Ranks.join("gpu" if device == "cuda" else "cpu", TIMEOUT_S)
        device = str(ranks.device)
    try:
        network = ScriptedNetwork(options.network, device)
        batches, source = _numbered_samples(options, ranks, device)
        reference = load_reference(options.reference, network, ranks, options.cache)
        measured = evaluate_against(batches, reference, network, ranks, codec=options.through, seed=options.seed)
    finally:
        if ranks is not None:
            ranks.leave()
    if ranks is None or ranks.rank == 0:
        values = dataclasses.asdict(measured)
        flat = values.pop("quality") | values | {"source": source, "seed": options.seed}
        text = json.dumps(flat, indent=2) if options.json else render_measured(measured, source=source)
        sys.stdout.write(text + "\n")
    return 0


def _numbered_samples(options: argparse.Namespace, ranks: Ranks | None, device: str) -> tuple[Numbered, str]:
    """This rank's batches of the samples that the options name, drawn lazily, and a description of their source."""
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    numbers = itertools.count(rank, world_size)
    if options.run is None:
        samples, source = _given_samples(options)
        return zip(numbers, samples.split(BATCH_SIZE)[rank::world_size], strict=False), source
    drawn = sample_batches(
        *load_run(options.run, None, device), num=options.num, seed=options.seed, rank=rank, world_size=world_size
    )
    return zip(numbers, drawn, strict=False), f"from {options.run}"


def _samples(options: argparse.Namespace, num_classes: int) -> tuple[Uint8Image, str, Tensor | None]:
    """The samples that the options name, a description of their source, and their requested classes."""
    if options.run is None:
        return *_given_samples(options), None
    generator, diffusion, config = load_run(options.run, None, default_device())
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"the run has {config.data.num_classes} classes, {options.reference} {num_classes}: give the data set that "
            "the run was trained on"
        )
    samples = sample_images(generator, diffusion, config, num=options.num, seed=options.seed, shows_progress=True)
    asked = torch.arange(options.num) % num_classes if config.data.num_classes else None  # see sample_batches
    return samples, f"from {options.run}", asked


def _given_samples(options: argparse.Namespace) -> tuple[Uint8Image, str]:
    form = " (PNG files)" if options.samples.is_dir() else ""
    return load_images(options.samples), f"from {options.samples}{form}"
