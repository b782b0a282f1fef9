"""How many modes of StackedMNIST a run covers: `python -m trainer.modes --run DIR --reference DIR --test DIR`.

A sample is three digits, one per colour channel, and these digits are its mode. A digit classifier is trained on the
channels of the reference and tested on stacks made from other digits; then it classifies the channels of the samples.
The result is the number of modes that occur, and the KL divergence of their frequencies from uniform ones, as in PacGAN
(arXiv 1712.04086) and DDGAN (2112.07804).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from data.shards.index import load_index
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from models.shapes import Uint8Image
from trainer.config.command_line import add_seed_argument
from trainer.evaluate.classifier import TrainedClassifier, train_classifier
from trainer.evaluate.reference import read_all
from trainer.sample.draw import sample_run
from trainer.sample.images import load_images

NUM_MODES = 1000
NUM_SAMPLES = 25_600
"""As published. Divergences for other numbers of samples cannot be compared with the published ones."""
NEEDED_ACCURACY = 0.99
TRAINING_STEPS = 4000


@dataclass(frozen=True, kw_only=True)
class ModeCount:
    """The modes in a set of samples."""

    num_samples: int
    num_modes: int
    """Modes with at least one sample."""
    kl: float
    """KL(mode frequencies || uniform) in nats; about 999 / (2 num_samples) even if all modes are equally likely."""
    classifier_accuracy: float
    """Share of the single test digits that are classified correctly."""


class ModesError(UserError):
    """Modes cannot be counted; the message says why, and what to do."""


def single_digits(stacks: Uint8Image, modes: Int64[Tensor, " b"]) -> tuple[Uint8Image, Int64[Tensor, " b"]]:
    """The channels of labelled stacks as separate images, uint8 [3 B, 1, H, W], and their digits."""
    digits = torch.stack((modes // 100, modes // 10 % 10, modes % 10), dim=1)
    return stacks.flatten(0, 1)[:, None], digits.flatten()


def digit_classifier(reference: Path, test: Path, *, seed: int) -> TrainedClassifier:
    """Train a classifier on the channels of `reference` and test it on those of `test`.

    Args:
        reference, test: data sets that passed `check_stacks`.
        seed: seed of the classifier.

    Raises:
        ModesError: the classifier is not accurate enough.
        DataError: a data set is incomplete or damaged.
    """
    trained = train_classifier(*_digits_of(reference), seed=seed, steps=TRAINING_STEPS)
    images, digits = _digits_of(test)
    accuracy = (trained.predict(images) == digits).double().mean().item()
    if accuracy < NEEDED_ACCURACY:
        raise ModesError(
            f"the classifier gets {accuracy:.2%} of the digits of {test} right, but counting modes needs "
            f"{NEEDED_ACCURACY:.0%}: prepare more stacks for --reference, or larger images"
        )
    return TrainedClassifier(model=trained.model, accuracy=accuracy, num_held_out=len(digits))


def check_stacks(reference: Path, test: Path) -> int:
    """Refuse unusable data sets before minutes are spent on training; returns the side of their images in pixels.

    Raises:
        ModesError: they were not prepared from StackedMNIST, have different sizes, or were made from the same digits.
        DataError: there is no data set.
    """
    indexes = [load_index(path) for path in (reference, test)]
    for path, index in zip((reference, test), indexes, strict=True):
        if not index.source.startswith("stackedmnist:"):
            raise ModesError(f"{path} was prepared from {index.source}: give one prepared from stackedmnist:PATH")
    learnt, unseen = indexes
    if learnt.image_size != unseen.image_size:
        raise ModesError(
            f"{reference} has {learnt.image_size} px and {test} has {unseen.image_size} px: prepare both with the same "
            "--size"
        )
    if learnt.source == unseen.source:
        raise ModesError(
            f"{test} was made from the same digits as {reference}, so it cannot measure accuracy on unseen digits: "
            "prepare it with the other --split"
        )
    return learnt.image_size


def _digits_of(stacks: Path) -> tuple[Uint8Image, Int64[Tensor, " b"]]:
    images, modes = read_all(stacks)
    assert modes is not None  # stacks have labels
    return single_digits(images, modes)


def count_modes(samples: Uint8Image, classifier: TrainedClassifier) -> ModeCount:
    """Count the modes of samples, uint8 [N, 3, H, W].

    Raises:
        ModesError: the samples have another shape than the images that the classifier was trained on.
    """
    _check_samples(samples, classifier.image_size)
    red, green, blue = classifier.predict(samples.flatten(0, 1)[:, None]).view(-1, 3).unbind(dim=1)
    counts = torch.bincount(100 * red + 10 * green + blue, minlength=NUM_MODES).double()
    frequencies = counts[counts > 0] / len(samples)
    return ModeCount(
        num_samples=len(samples),
        num_modes=len(frequencies),
        kl=(frequencies * frequencies.log()).sum().item() + math.log(NUM_MODES),
        classifier_accuracy=classifier.accuracy,
    )


def _check_samples(samples: Uint8Image, size: int) -> None:
    if samples.ndim != 4 or samples.shape[1:] != (3, size, size) or not len(samples):
        raise ModesError(
            f"samples are {list(samples.shape)}, but the reference is [N, 3, {size}, {size}]: give the reference that "
            "the run was trained on"
        )


@as_command(name="trainer.modes", failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0, or 2 after one line that says what to change."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.modes", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=path_argument, metavar="DIR", help="draw samples from this run")
    source.add_argument(
        "--samples",
        type=path_argument,
        metavar="FILE",
        help="use these samples instead: an .npz file or a folder of PNGs",
    )
    parser.add_argument(
        "--reference",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="prepared stacks that train the classifier",
    )
    parser.add_argument(
        "--test", type=path_argument, required=True, metavar="DIR", help="prepared stacks of other digits"
    )
    parser.add_argument(
        "--num", type=whole_number(1), default=NUM_SAMPLES, help=f"samples to draw (default: {NUM_SAMPLES})"
    )
    add_seed_argument(parser, "of the classifier and the samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    size = check_stacks(options.reference, options.test)
    samples = load_images(options.samples) if options.samples else sample_run(options.run, options.num, options.seed)
    _check_samples(samples, size)
    classifier = digit_classifier(options.reference, options.test, seed=options.seed)
    found = count_modes(samples, classifier)
    if options.json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    else:
        sys.stdout.write(
            f"{found.num_modes} of {NUM_MODES} modes, KL {found.kl:.3f}, in {found.num_samples} samples; the "
            f"classifier gets {found.classifier_accuracy:.2%} of unseen digits right\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
