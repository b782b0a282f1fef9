"""How good samples are: `python -m trainer.evaluate --run DIR|--samples FILE --reference DIR [--network NAME|FILE.pt]`.

Measures samples against a reference: Fréchet and kernel distance, class score, precision, recall, density and
coverage, in the features of Inception, where they are FID, KID and Inception score, of DINOv2, of EfficientNet-Lite0,
or of a TorchScript network. Or in those of a classifier that is trained on the labelled reference in the same run, and
then with the distance of pure noise as well. Compare figures only for one data set, one network and equal numbers of
samples: the Fréchet distance of few samples is biased upwards, see --infinity. With any network but the classifier,
ranks share the work: `torchrun --nproc-per-node 2 -m -- trainer.evaluate --run DIR ...` (torchrun would take --run for
its own without `--`).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, get_args

import torch
from torch import Tensor

from data.shards.index import load_index
from data.storage.arguments import ranges_of_whole_numbers, whole_number
from data.storage.errors import UserError, as_command
from data.storage.files import check_writable
from data.storage.paths import path_argument
from models.shapes import Uint8Image
from trainer.checkpoint.retention import checkpoint_argument
from trainer.config.command_line import add_seed_argument, check_group
from trainer.evaluate.card import arguments_of, read_card
from trainer.evaluate.classifier import EVALUATION_BATCH_SIZE, NO_LABELS, evaluate_samples
from trainer.evaluate.judges import CLASSIFIER, NAMES, NONE, default_network, network_argument
from trainer.evaluate.kept import cache_folder
from trainer.evaluate.measuring import (
    checkpoints_argument,
    evaluate_with_network,
    keep_reference,
    measure_pairs,
    source_of,
)
from trainer.evaluate.networks.features import Codec, through
from trainer.evaluate.networks.published import PUBLISHED
from trainer.evaluate.networks.weights import convert_weights, converted_file
from trainer.evaluate.picture import COLUMNS, ROWS, draw_picture
from trainer.evaluate.reference import pairs_of, read_all
from trainer.evaluate.report import CODEC_WORDS, render
from trainer.sample.conditions import compared, given_pairs
from trainer.sample.draw import (
    add_weights_argument,
    default_device,
    images_at_once,
    load_run,
    sample_batches,
    with_progress,
)
from trainer.sample.fidelity import Fidelity
from trainer.sample.images import open_images
from trainer.tracking.spool import read_curves

NUM_SAMPLES = 500


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@as_command(name="trainer.evaluate", failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line about what the user has to change."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args([*_arguments_of_card(arguments), *arguments])
    if options.convert is not None:
        return _convert(options, parser)
    _check(options, parser)
    if options.network is None:
        options.network = default_network(options.reference)
        if options.network != CLASSIFIER:
            if options.picture is not None:
                parser.error(f"--picture needs labels, and {options.reference} has none")
            if check_group()[0] == 0:
                measures = "PSNR and SSIM are all" if options.network == NONE else f"{options.network} measures"
                sys.stderr.write(f"trainer.evaluate: {options.reference} has no labels, so {measures}\n")
    if options.network == NONE:
        return _evaluate_pairs(options, parser)
    if options.statistics:
        return keep_reference(options)
    only_for_networks = (options.checkpoints, options.card, options.check, options.neighbours)
    if options.network != CLASSIFIER or options.infinity or any(given is not None for given in only_for_networks):
        if options.picture is not None:
            parser.error(
                "--picture cannot be given together with --checkpoints, --card, --check, --neighbours or --infinity"
            )
        return evaluate_with_network(options)
    return _evaluate_with_classifier(options)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m trainer.evaluate", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--samples", type=path_argument, metavar="FILE.npz|FOLDER", help="uint8 images [N, H, W, C], or PNGs"
    )
    what.add_argument(
        "--run", type=path_argument, metavar="DIR", help="draw the samples from a run, a snapshot or an exported model"
    )
    what.add_argument(
        "--statistics",
        action="store_true",
        help="measure nothing: keep features and statistics of the reference, a prepared data set, in its folder",
    )
    what.add_argument(
        "--convert",
        type=path_argument,
        metavar="FILE",
        help="measure nothing: take this state dict, .pth or .safetensors, for the weights of --network",
    )
    parser.add_argument("--num", type=whole_number(2), help=f"samples to draw with --run (default: {NUM_SAMPLES})")
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="0-499,600",
        help="with --run: measure the first sample of each of these seeds, in place of --num and those of --seed",
    )
    of_run = parser.add_mutually_exclusive_group()
    of_run.add_argument(
        "--checkpoint",
        type=checkpoint_argument,
        metavar="STEP",
        help="with --run: its checkpoint of a step, latest (default), or best by checkpoint.keep_best",
    )
    of_run.add_argument(
        "--checkpoints",
        type=checkpoints_argument,
        metavar="all|STEPS",
        help="with --run: measure every checkpoint, the latest or the best (checkpoint.keep_best), or those of these "
        "steps, in one table",
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--reference",
        type=path_argument,
        metavar="DIR|FILE.npz",
        help="prepared data set, with labels for the classifier; for other networks any one, PNGs, or .npz of images "
        "or of mu and sigma",
    )
    parser.add_argument(
        "--network",
        type=network_argument,
        metavar="NAME|FILE.pt",
        help=f"whose features are taken: {', '.join(NAMES)}, or TorchScript. classifier is a small one, trained on "
        "the reference (default if that has labels); lite0 is EfficientNet-Lite0, for photographs (default without "
        "labels). none: PSNR and SSIM of pairs alone",
    )
    parser.add_argument(
        "--infinity",
        action="store_true",
        help="also extrapolate the Fréchet distance to infinitely many samples, which takes away its bias",
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
    return parser


def _seeds(text: str) -> str:
    """The text of --seeds, which a card keeps."""
    if len(ranges_of_whole_numbers(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is given; figures need two samples at least")
    return text


def _convert(options: argparse.Namespace, parser: _Parser) -> int:
    """Convert weights and say what they are."""
    if (published := PUBLISHED.get(options.network)) is None:
        parser.error(f"--convert needs --network, which is one of {', '.join(PUBLISHED)}")
    pinned = published.weights
    sha256 = convert_weights(options.convert, pinned, published.build)
    names = [name for name, other in PUBLISHED.items() if other.weights is pinned]
    what = "the published file" if sha256 == pinned.sha256 else "not the published file, and results will say so"
    sys.stdout.write(f"{converted_file(pinned)}: weights for {', '.join(names)}, from SHA-256 {sha256}, {what}\n")
    return 0


def _check(options: argparse.Namespace, parser: _Parser) -> None:
    """Refuse options that do not fit each other."""
    if options.reference is None:
        parser.error("the following arguments are required: --reference")
    if options.picture is not None and (options.network not in (None, CLASSIFIER) or options.picture.suffix != ".png"):
        parser.error("--picture takes a name that ends in .png, and needs the network classifier")
    for name in ("picture", "card", "neighbours"):
        if (file := getattr(options, name)) is not None:
            if not file.parent.is_dir():
                parser.error(f"--{name} is {file}, but there is no folder {file.parent}: create it first")
            check_writable(file)
    if options.neighbours is not None and (options.neighbours.suffix != ".png" or options.checkpoints is not None):
        parser.error("--neighbours takes a name that ends in .png, and cannot be given together with --checkpoints")
    if options.checkpoints is not None and options.run is None:
        parser.error("--checkpoints needs --run: samples from a file belong to no checkpoint")
    if options.checkpoint is not None and options.run is None:
        parser.error("--checkpoint needs --run: samples from a file belong to no checkpoint")
    if options.weights == "live" and options.run is None:
        parser.error("--weights live needs --run: samples from a file are as they are")
    if options.seeds is not None:
        if options.num is not None or options.run is None:
            parser.error("--seeds needs --run, and takes the place of --num: each seed gives one sample")
        options.num = len(ranges_of_whole_numbers(options.seeds))
    options.num = NUM_SAMPLES if options.num is None else options.num
    measures = (options.picture, options.card, options.check, options.neighbours, options.infinity or None)
    if options.statistics and any(given is not None for given in measures):
        parser.error("--statistics measures no samples: leave --picture, --card, --check, --neighbours, --infinity out")


def _arguments_of_card(arguments: Sequence[str]) -> list[str]:
    """The arguments in the card of --check, if that is given; those on the command line come after them."""
    first = _Parser(prog="python -m trainer.evaluate", add_help=False, allow_abbrev=False)
    first.add_argument("--check", type=path_argument)
    card = first.parse_known_args(arguments)[0].check
    return [] if card is None else arguments_of(read_card(card))


def _evaluate_pairs(options: argparse.Namespace, parser: _Parser) -> int:
    """The command without a network."""
    others = ("statistics", "infinity", "card", "check", "neighbours", "picture", "checkpoints")
    given = [f"--{name}" for name in others if getattr(options, name)]
    if given or options.run is None:
        what = f"leave {', '.join(given)} out" if given else "give --run, a run that translates"
        parser.error(f"--network is {NONE}, so that PSNR and SSIM of pairs are all that is measured: {what}")
    return measure_pairs(options)


def _evaluate_with_classifier(options: argparse.Namespace) -> int:
    """The command with a classifier that is trained on the reference, and with the distance of noise."""
    index = load_index(options.reference)
    if index.num_classes is None:  # reported before a large data set is read in vain
        raise UserError(f"{options.reference}: {NO_LABELS}")
    fidelity = Fidelity()
    samples, source, asked = _samples(options, index.num_classes, fidelity)
    passed = map(through(options.through), samples)
    shown: list[Uint8Image] = []
    if options.picture is not None:
        passed = _shown_too(passed, shown, COLUMNS * max(ROWS, index.num_classes))
    source += f", measured through {CODEC_WORDS[options.through]}"
    reference, labels = read_all(options.reference)
    evaluation = evaluate_samples(passed, reference, labels, options.seed, asked)
    if options.json:
        fields = dataclasses.asdict(evaluation) | {"ratio": evaluation.ratio, "source": source, "judge": CLASSIFIER}
        text = json.dumps(fields | fidelity.named(), indent=2)
    else:
        text = render(evaluation, source=source, class_names=index.class_names)
        text += f"\n\n{fidelity.table()}" if fidelity.num_images else ""
    sys.stdout.write(text + "\n")
    if options.picture is not None:
        drawn = torch.cat(shown)
        draw_picture(
            options.picture,
            real=(reference, labels),
            samples=(drawn, None if asked is None else asked[: len(drawn)]),
            class_names=index.class_names or (),
            curves=read_curves(options.run) if options.run else {},
        )
        sys.stderr.write(f"trainer.evaluate: the picture is {options.picture}\n")
    return 0


def _shown_too(batches: Iterable[Uint8Image], shown: list[Uint8Image], num: int) -> Iterator[Uint8Image]:
    """The batches; the first ones, of `num` images and perhaps some more, are added to `shown`."""
    for batch in batches:
        if sum(map(len, shown)) < num:
            shown.append(batch)
        yield batch


def _samples(
    options: argparse.Namespace, num_classes: int, fidelity: Fidelity
) -> tuple[Iterable[Uint8Image], str, Tensor | None]:
    """Batches of the samples that the options name, a description of their source, and their requested classes.

    Those of a model that translates are compared with the images of their pairs while they are drawn.
    """
    if options.run is None:
        return open_images(options.samples).batches(EVALUATION_BATCH_SIZE), source_of(options), None
    generator, diffusion, config = load_run(options.run, options.checkpoint, default_device(), options.weights)
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"the run has {config.data.num_classes} classes, {options.reference} {num_classes}: give the data set that "
            "the run was trained on"
        )

    pairs = pairs_of(options.reference)

    def drawn() -> Iterator[Uint8Image]:
        with given_pairs(config, pairs) as given:
            seeds = options.seeds and ranges_of_whole_numbers(options.seeds)
            batches = sample_batches(
                generator, diffusion, config, num=options.num, seed=options.seed, seeds=seeds, **given
            )
            yield from compared(batches, given, fidelity, batch_size=images_at_once(config.data.image_size))

    samples, asked = with_progress(drawn(), options.num, config), None
    if config.data.num_classes:  # see sample_batches
        with given_pairs(config, pairs) as given:
            classes = torch.tensor(given.get("classes", range(num_classes)))
        asked = classes[torch.arange(options.num) % len(classes)]
    return samples, f"from {options.run}", asked
