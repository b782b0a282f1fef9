"""How good samples are: `python -m trainer.evaluate --run DIR|--samples FILE --reference DIR [--network NAME|FILE.pt]`.

Measures samples against a reference: Fréchet and kernel distance, class score, precision, recall, density and
coverage, in the features of EfficientNet-Lite0, or of a TorchScript network: with Inception they are FID, KID and
Inception score. Or in those of a classifier that is trained on the labelled reference in the same run, and then with
the distance of pure noise as well. Compare figures only for one data set, one network and equal numbers of samples: the
Fréchet distance of few samples is biased upwards. With lite0 or a file, ranks share the work:
`torchrun --nproc-per-node 2 -m -- trainer.evaluate --run DIR ...` (torchrun would take --run for its own without `--`).
"""

import argparse
import dataclasses
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
from trainer.evaluate.card import arguments_of, read_card
from trainer.evaluate.classifier import NO_LABELS, evaluate_samples
from trainer.evaluate.features import Codec, through
from trainer.evaluate.judges import CLASSIFIER, default_network, network_argument
from trainer.evaluate.measuring import GivenSamples, checkpoints_argument, evaluate_with_network, source_of
from trainer.evaluate.picture import draw_picture
from trainer.evaluate.reference import cache_folder, read_all
from trainer.evaluate.report import CODEC_WORDS, render
from trainer.sample.conditions import given_pairs
from trainer.sample.draw import add_weights_argument, default_device, load_run, sample_images
from trainer.tracking.spool import read_curves


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
        "--checkpoints",
        type=checkpoints_argument,
        metavar="all|STEPS",
        help="with --run: measure every checkpoint, the latest or the best (checkpoint.keep_best), or those of these "
        "steps, in one table (default: the latest)",
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--reference",
        type=path_argument,
        required=True,
        metavar="DIR|FILE.npz",
        help="prepared data set, labelled; with lite0 or a file any one, PNGs, or .npz of images or of mu and sigma",
    )
    parser.add_argument(
        "--network",
        type=network_argument,
        metavar="classifier|lite0|FILE.pt",
        help="whose features are taken: a small classifier, trained on the reference (default if that has labels); "
        "EfficientNet-Lite0, for photographs (default without labels); or TorchScript, such as Inception",
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
        help="draw real images, samples and the curves of the run; only with the classifier",
    )
    parser.add_argument(
        "--card",
        type=path_argument,
        metavar="FILE.json",
        help="write the figures with hashes of weights, reference and network, and the command",
    )
    parser.add_argument(
        "--check",
        type=path_argument,
        metavar="FILE.json",
        help="measure again what a card says and compare; exit code 1 if anything differs. Other options, such as the "
        "place of the run, may be given in addition",
    )
    parser.add_argument(
        "--neighbours",
        type=path_argument,
        metavar="FILE.png",
        help="draw the samples that are closest to images of the reference beside these, and tell how many are closer "
        "than the reference's images are to each other",
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args([*_arguments_of_card(arguments), *arguments])
    if options.picture is not None and (options.network not in (None, CLASSIFIER) or options.picture.suffix != ".png"):
        parser.error("--picture takes a name that ends in .png, and needs the network classifier")
    if options.picture is not None and not options.picture.parent.is_dir():
        parser.error(
            f"--picture is {options.picture}, but there is no folder {options.picture.parent}: create it first"
        )
    for name in ("card", "neighbours"):
        file = getattr(options, name)
        if file is not None and not file.parent.is_dir():
            parser.error(f"--{name} is {file}, but there is no folder {file.parent}: create it first")
    if options.neighbours is not None and (options.neighbours.suffix != ".png" or options.checkpoints is not None):
        parser.error("--neighbours takes a name that ends in .png, and cannot be given together with --checkpoints")
    if options.checkpoints is not None and options.run is None:
        parser.error("--checkpoints needs --run: samples from a file belong to no checkpoint")
    if options.weights == "live" and options.run is None:
        parser.error("--weights live needs --run: samples from a file are as they are")
    if options.network is None:
        options.network = default_network(options.reference)
        if options.network != CLASSIFIER:
            if options.picture is not None:
                parser.error(f"--picture needs labels, and {options.reference} has none")
            if check_group()[0] == 0:
                sys.stderr.write(
                    f"trainer.evaluate: {options.reference} has no labels, so {options.network} measures\n"
                )
    if options.network != CLASSIFIER or any(
        given is not None for given in (options.checkpoints, options.card, options.check, options.neighbours)
    ):
        if options.picture is not None:
            parser.error("--picture cannot be given together with --checkpoints, --card, --check or --neighbours")
        return evaluate_with_network(options)
    return _evaluate_with_classifier(options)


def _arguments_of_card(arguments: Sequence[str]) -> list[str]:
    """The arguments in the card of --check, if that is given; those on the command line come after them."""
    first = _Parser(prog="python -m trainer.evaluate", add_help=False, allow_abbrev=False)
    first.add_argument("--check", type=path_argument)
    card = first.parse_known_args(arguments)[0].check
    return [] if card is None else arguments_of(read_card(card))


def _evaluate_with_classifier(options: argparse.Namespace) -> int:
    """The command with a classifier that is trained on the reference, and with the distance of noise."""
    index = load_index(options.reference)
    if index.num_classes is None:  # reported before a large data set is read in vain
        raise UserError(f"{options.reference}: {NO_LABELS}")
    samples, source, asked = _samples(options, index.num_classes)
    samples = through(options.through)(samples)
    source += f", measured through {CODEC_WORDS[options.through]}"
    reference, labels = read_all(options.reference)
    evaluation = evaluate_samples(samples, reference, labels, options.seed, asked)
    if options.json:
        fields = dataclasses.asdict(evaluation) | {"ratio": evaluation.ratio, "source": source, "judge": CLASSIFIER}
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


def _samples(options: argparse.Namespace, num_classes: int) -> tuple[Uint8Image, str, Tensor | None]:
    """The samples that the options name, a description of their source, and their requested classes."""
    if options.run is None:
        given = GivenSamples(options.samples)
        return given.images, source_of(options), None
    generator, diffusion, config = load_run(options.run, None, default_device(), options.weights)
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"the run has {config.data.num_classes} classes, {options.reference} {num_classes}: give the data set that "
            "the run was trained on"
        )
    with given_pairs(config) as given:
        samples = sample_images(
            generator, diffusion, config, num=options.num, seed=options.seed, shows_progress=True, **given
        )
    asked = None
    if config.data.num_classes:  # see sample_batches
        classes = torch.tensor(given.get("classes", range(num_classes)))
        asked = classes[torch.arange(options.num) % len(classes)]
    return samples, f"from {options.run}", asked
