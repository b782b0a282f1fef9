"""How good samples are: `python -m trainer.evaluate --run DIR|--samples FILE --reference DIR [--network FILE.pt]`.

Measures samples against a reference: FID, KID, Inception score, precision, recall, density and coverage, in the
features of a TorchScript network; or, without one, of a classifier that is trained on the labelled reference in the
same run, with the distance of pure noise beside it. Compare figures only for one data set, one network and equal
numbers of samples: the Fréchet distance of few samples is biased upwards. With --network, ranks share the work:
`torchrun --nproc-per-node 2 -m -- trainer.evaluate --run DIR ...` (torchrun would take --run for its own without `--`).
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from data.shards import load_index
from models.diffusion import Diffusion
from models.shapes import Uint8Image
from trainer.checkpoint import CheckpointError
from trainer.classifier import NUM_FEATURES, TrainedClassifier, train_classifier
from trainer.command import add_seed_argument
from trainer.config import TrainConfig
from trainer.features import JPEG_QUALITY, Codec, ScriptedNetwork, through
from trainer.images import load_images, to_uint8
from trainer.measure import BATCH_SIZE, Measured, Numbered, cache_folder, load_reference, measure_samples, read_all
from trainer.quality import Quality, frechet_distance, measure, statistics_of
from trainer.ranks import Ranks
from trainer.sample import default_device, load_run, sample_batches, sample_images

TIMEOUT_S = 3600
"""How long a rank waits for the others, which may draw more slowly."""
MAX_LISTED_CLASSES = 20
"""With more classes the table sums their shares up; --json holds all."""
CODEC_WORDS: dict[Codec, str] = {
    "none": "no file codec",
    "png": "PNG, lossless",
    "jpeg": f"JPEG of quality {JPEG_QUALITY}",
}
NO_LABELS = (
    "the reference has no labels, so no classifier can be trained to measure in: evaluate on a labelled data set, "
    "or write the samples to a .npz file and give it to an FID program"
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one set of samples."""

    num_samples: int
    """Samples measured, and noise images beside them."""
    num_reference: int
    """Images of the reference, all of them used."""
    seed: int
    """Of the classifier and of the noise."""
    classifier_accuracy: float
    """Share of the held-out reference images that the classifier labels rightly."""
    num_held_out: int
    """Held-out reference images, a fifth."""
    frechet_samples: float
    """Fréchet distance of the samples to the reference in the classifier's features."""
    frechet_noise: float
    """The same of noise: N(0, 1) clipped to [-1, 1]."""
    class_shares: tuple[float, ...]
    """Share of each class among the samples, by the classifier; they sum to 1."""
    reference_class_shares: tuple[float, ...]
    """Share of each class in the reference, by its labels."""
    quality: Quality | None = None
    """Figures of merit in the classifier's features."""
    agreement: float | None = None
    """Share of the samples that the classifier takes for the class that was asked for; None where none was."""
    class_agreement: dict[int, float] | None = None
    """The same of the samples of each class that was asked for."""

    @property
    def ratio(self) -> float:
        """Distance of the samples over that of noise: 1 for noise, and above 1 where a few classes are all there is.

        Real images that the classifier has not seen do not come to 0: 397 of the digits to 0.02 or 0.03, 100 to 0.08.
        """
        return self.frechet_samples / self.frechet_noise


def evaluate_samples(
    samples: UInt8[Tensor, "n _ _ _"],
    reference: UInt8[Tensor, "m c h w"],
    labels: Int64[Tensor, "m"] | None,
    seed: int,
    asked: Int64[Tensor, "n"] | None = None,
    classifier: TrainedClassifier | None = None,
) -> Evaluation:
    """Measure samples against a labelled reference; some seconds on a CPU at 16 px.

    Args:
        samples: uint8 [N, C, H, W], N > 1.
        reference: uint8 [M, C, H, W], M >= 10.
        labels: int64 [M], counted from 0; None is refused.
        seed: of the classifier and the noise, 0 or more.
        asked: the class that each sample was asked to be; None: none was.
        classifier: trained on the same reference with the same seed, as it would be here.

    Raises:
        ValueError: no labels, too few images, or samples of another shape than the reference.
    """
    if labels is None:
        raise ValueError(NO_LABELS)
    if samples.dtype != torch.uint8 or samples.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"the samples are {samples.dtype} {list(samples.shape)}, the reference is {reference.dtype} "
            f"{list(reference.shape)}: channels, height and width must be equal and all uint8"
        )
    if len(samples) < 2:
        raise ValueError(
            f"{len(samples)} sample has no covariance: give at least 2, better as many as the reference has"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected 0 to 2**63 - 1")
    classifier = classifier or train_classifier(reference, labels, seed=seed)
    reference_features = classifier.features(reference)
    noise = noise_images(samples.shape, seed=seed)
    logits = classifier.logits(samples)
    quality = measure(classifier.features(samples), reference_features, logits=logits, seed=seed)
    num_classes, predicted = int(labels.max()) + 1, logits.argmax(dim=1)
    agreement, class_agreement = (None, None) if asked is None else _agreement(predicted, asked)
    return Evaluation(
        num_samples=len(samples),
        num_reference=len(reference),
        seed=seed,
        classifier_accuracy=classifier.accuracy,
        num_held_out=classifier.num_held_out,
        frechet_samples=quality.fid,
        frechet_noise=frechet_distance(statistics_of(classifier.features(noise)), statistics_of(reference_features)),
        quality=quality,
        class_shares=_shares(predicted, num_classes),
        reference_class_shares=_shares(labels, num_classes),
        agreement=agreement,
        class_agreement=class_agreement,
    )


def _agreement(predicted: Tensor, asked: Tensor) -> tuple[float, dict[int, float]]:
    right = (predicted == asked).double()
    return right.mean().item(), {label: right[asked == label].mean().item() for label in asked.unique().tolist()}


def noise_images(shape: Sequence[int], *, seed: int) -> Uint8Image:
    """Images of independent N(0, 1) pixels, clipped to [-1, 1]: what a run shows that has learnt nothing."""
    generator = torch.Generator().manual_seed(seed)
    return to_uint8(torch.randn(tuple(shape), generator=generator))


def render(evaluation: Evaluation, *, source: str, class_names: Sequence[str] | None = None) -> str:
    """The figures as a short table.

    Args:
        evaluation: the figures.
        source: where the samples come from and what they went through.
        class_names: names of the classes; numbers if left out.
    """
    e = evaluation
    lines = [
        f"samples    {e.num_samples} images, {source}",
        f"reference  {e.num_reference} images, all of the data set",
        f"features   {NUM_FEATURES} of a classifier trained on the data set (seed {e.seed}),",
        f"           right on {e.classifier_accuracy:.2%} of {e.num_held_out} held-out images",
        "",
        f"{'Fréchet distance to the reference':<34}{'samples':>10}{'noise':>10}{'ratio':>10}",
        f"{'':<34}{e.frechet_samples:>10.4g}{e.frechet_noise:>10.4g}{e.ratio:>10.4f}",
        "",
        *([*quality_lines(e.quality, given_network=False), ""] if e.quality else []),
    ]
    if e.agreement is not None and e.class_agreement:
        least = min(e.class_agreement, key=e.class_agreement.__getitem__)
        of_least = f"{e.class_agreement[least]:.1%} of class {_name(least, class_names)}, the least"
        lines += [f"{'of the class that was asked for':<34}{e.agreement:>10.1%}, {of_least}", ""]
    shares, reference = e.class_shares, e.reference_class_shares
    if len(shares) > MAX_LISTED_CLASSES:
        seen, present = (sum(share > 0 for share in values) for values in (shares, reference))
        largest = max(range(len(shares)), key=shares.__getitem__)
        lines += [
            f"classes    {seen} of {present} seen among the samples",
            f"           largest share {shares[largest]:.2%} ({_name(largest, class_names)}), "
            f"in the reference {reference[largest]:.2%}",
        ]
    else:
        lines.append(f"{'share of class':<34}{'samples':>10}{'reference':>10}")
        lines += [f"{_name(i, class_names):<34}{share:>10.1%}{reference[i]:>10.1%}" for i, share in enumerate(shares)]
    return "\n".join(lines)


def quality_lines(quality: Quality, *, given_network: bool) -> list[str]:
    """The figures that there are, one a line; FID, KID and Inception score are called so in a given network only."""
    words = {
        # The classifier's stands above already, beside that of noise.
        "fid": "Fréchet distance (FID)" if given_network else "",
        "kid": "kernel distance (KID)" if given_network else "kernel distance",
        "inception_score": "Inception score" if given_network else "class score, like Inception's",
        "precision": "precision",
        "recall": "recall",
        "density": "density",
        "coverage": "coverage",
    }
    values = dataclasses.asdict(quality)
    return [f"{words[name]:<34}{value:>10.4g}" for name, value in values.items() if words[name] and value is not None]


def render_measured(measured: Measured, *, source: str) -> str:
    """The figures of a given network as a short table."""
    m = measured
    reference = f"{m.num_reference} images" if m.num_reference else "statistics of a number of images that is not said"
    lines = [
        f"samples    {m.num_samples} images, {source}, measured through {CODEC_WORDS[m.through]}",
        f"reference  {reference}",
    ]
    return "\n".join([*lines, f"features   {m.network}", "", *quality_lines(m.quality, given_network=True)])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 after one line about what the user has to change."""
    parser = _Parser(
        prog="python -m trainer.evaluate", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--samples", type=Path, metavar="FILE.npz|FOLDER", help="uint8 images [N, H, W, C], or PNGs")
    what.add_argument("--run", type=Path, metavar="DIR", help="draw the samples from the newest checkpoint of a run")
    parser.add_argument("--num", type=int, default=500, help="samples to draw with --run (default: 500)")
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DIR|FILE.npz",
        help="prepared data set, labelled; with --network any one, PNGs, or .npz of images or of mu and sigma",
    )
    parser.add_argument(
        "--network",
        type=Path,
        metavar="FILE.pt",
        help="TorchScript whose features are taken (default: a small classifier, trained on the reference)",
    )
    parser.add_argument(
        "--through",
        choices=get_args(Codec),
        default="none",
        help="file format that the samples go through first; jpeg is what the authors of DDGAN did (default: none)",
    )
    parser.add_argument("--cache", type=Path, default=cache_folder(), metavar="DIR", help="where references are kept")
    add_seed_argument(parser, "of the classifier, noise, subsets and samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    try:
        options = parser.parse_args(arguments)
        if options.network is not None:
            return _measure_with(options)
        index = load_index(options.reference)
        if index.num_classes is None:  # told before a large data set is read in vain
            raise ValueError(f"{options.reference}: {NO_LABELS}")
        samples, source, asked = _samples(options, index.num_classes)
        samples = through(options.through)(samples)
        source += f", measured through {CODEC_WORDS[options.through]}"
        reference, labels = read_all(options.reference)
        evaluation = evaluate_samples(samples, reference, labels, options.seed, asked)
    except ValueError as error:
        sys.stderr.write(f"trainer.evaluate: {error}\n")
        return 2
    if options.json:
        fields = dataclasses.asdict(evaluation) | {"ratio": evaluation.ratio, "source": source}
        text = json.dumps(fields, indent=2)
    else:
        text = render(evaluation, source=source, class_names=index.class_names)
    sys.stdout.write(text + "\n")
    return 0


def _measure_with(options: argparse.Namespace) -> int:
    """The command with a given network, on all ranks that torchrun started."""
    ranks = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        ranks = Ranks.join("gpu" if device == "cuda" else "cpu", TIMEOUT_S)
        device = str(ranks.device)
    try:
        network = ScriptedNetwork(options.network, device)
        batches, source = _numbered_samples(options, ranks, device)
        reference = load_reference(options.reference, network, ranks, options.cache)
        measured = measure_samples(batches, reference, network, ranks, codec=options.through, seed=options.seed)
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
    """This rank's batches of what the options name, drawn when they are asked for, and where they come from."""
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    numbers = itertools.count(rank, world_size)
    if options.run is None:
        samples, source = _given_samples(options)
        return zip(numbers, samples.split(BATCH_SIZE)[rank::world_size], strict=False), source
    drawn = sample_batches(
        *_load(options, device), num=options.num, seed=options.seed, rank=rank, world_size=world_size
    )
    return zip(numbers, drawn, strict=False), f"from {options.run}"


def _samples(options: argparse.Namespace, num_classes: int) -> tuple[Uint8Image, str, Tensor | None]:
    """The samples that the options name, words about where they come from, and the classes they were asked to be."""
    if options.run is None:
        return *_given_samples(options), None
    generator, diffusion, config = _load(options, default_device())
    if config.data.num_classes not in (0, num_classes):
        raise ValueError(
            f"the run has {config.data.num_classes} classes, {options.reference} {num_classes}: give the data set that "
            "the run was trained on"
        )
    samples = sample_images(generator, diffusion, config, num=options.num, seed=options.seed, shows_progress=True)
    asked = torch.arange(options.num) % num_classes if config.data.num_classes else None  # all in turn, see there
    return samples, f"from {options.run}", asked


def _given_samples(options: argparse.Namespace) -> tuple[Uint8Image, str]:
    form = " (PNG files)" if options.samples.is_dir() else ""
    return load_images(options.samples), f"from {options.samples}{form}"


def _load(options: argparse.Namespace, device: torch.device | str) -> tuple[nn.Module, Diffusion, TrainConfig]:
    if options.num < 2:
        raise ValueError(f"--num is {options.num}; at least 2 samples are needed")
    try:
        return load_run(options.run, None, device)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _shares(labels: Tensor, num_classes: int) -> tuple[float, ...]:
    counts = torch.bincount(labels, minlength=num_classes).double()
    return tuple((counts / len(labels)).tolist())


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None else str(label)


if __name__ == "__main__":
    sys.exit(main())
