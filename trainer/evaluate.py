"""How good samples are: `python -m trainer.evaluate --samples FILE.npz|FOLDER --reference SHARD_DIR`.

Measures the distance of samples to a labelled reference, in the features of a classifier that is trained on the
reference in the same run, and sets it against the distance of pure noise. Compare figures only for one data set, one
seed and equal numbers of samples: the Fréchet distance of few samples is biased upwards.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from data.cache import shard_files
from data.decode import decode_into
from data.pipeline import DataConfig
from data.reader import samples_in_order
from data.shards import load_index
from data.verification import verify_shards
from models.shapes import Uint8Image
from trainer.checkpoint import CheckpointError
from trainer.classifier import NUM_FEATURES, train_classifier
from trainer.images import load_images, to_uint8
from trainer.sample import sample_run

MAX_LISTED_CLASSES = 20
"""With more classes the table sums their shares up; --json holds all."""
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
) -> Evaluation:
    """Measure samples against a labelled reference; some seconds on a CPU at 16 px.

    Args:
        samples: uint8 [N, C, H, W], N > 1.
        reference: uint8 [M, C, H, W], M >= 10.
        labels: int64 [M], counted from 0; None is refused.
        seed: of the classifier and the noise, 0 or more.

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
    classifier = train_classifier(reference, labels, seed=seed)
    reference_features = classifier.features(reference)
    noise = noise_images(samples.shape, seed=seed)
    num_classes = int(labels.max()) + 1
    return Evaluation(
        num_samples=len(samples),
        num_reference=len(reference),
        seed=seed,
        classifier_accuracy=classifier.accuracy,
        num_held_out=classifier.num_held_out,
        frechet_samples=frechet_distance(classifier.features(samples), reference_features),
        frechet_noise=frechet_distance(classifier.features(noise), reference_features),
        class_shares=_shares(classifier.predict(samples), num_classes),
        reference_class_shares=_shares(labels, num_classes),
    )


def frechet_distance(features_a: Float[Tensor, "n d"], features_b: Float[Tensor, "m d"]) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Fréchet distance of FID (1706.08500, Eq. 6).

    Computed in float64. Sets of no more than d images have singular covariances; rounding then moves the result by
    some 1e-7 of tr(C_a + C_b), and what falls below 0 is given as 0.
    """
    metric = FrechetInceptionDistance(feature=_Given(features_a.shape[1]))
    metric.update(features_a.double(), real=False)
    metric.update(features_b.double(), real=True)
    return max(0.0, metric.compute().item())


def noise_images(shape: Sequence[int], *, seed: int) -> Uint8Image:
    """Images of independent N(0, 1) pixels, clipped to [-1, 1]: what a run shows that has learnt nothing."""
    generator = torch.Generator().manual_seed(seed)
    return to_uint8(torch.randn(tuple(shape), generator=generator))


def read_all(index_path: str | Path) -> tuple[Uint8Image, Int64[Tensor, "b"] | None]:
    """Decode every image of a prepared data set into memory, in the order of the index.

    Args:
        index_path: folder of index.json and the shards.

    Returns:
        uint8 [N, C, H, W] and labels int64 [N], None where the data set has none.

    Raises:
        DataError: something is missing or damaged.
    """
    index = load_index(index_path)
    verify_shards(index, by="size", cache_directory=None)
    images = np.empty((index.num_samples, index.image_size, index.image_size, index.image_channels), dtype=np.uint8)
    labels: list[int] = []
    with closing(shard_files(index, cache_directory=None, cache_gb=DataConfig.cache_gb)) as files:
        for out, sample in zip(images, samples_in_order(index.shards, files.open), strict=True):
            decode_into(out, sample)
            labels.append(-1 if sample.label is None else sample.label)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return pixels, None if index.num_classes is None else torch.tensor(labels)


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
    ]
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
        "--reference", type=Path, required=True, metavar="SHARD_DIR", help="prepared data set, labelled"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the classifier and the noise (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    try:
        options = parser.parse_args(arguments)
        index = load_index(options.reference)
        if index.num_classes is None:  # told before a large data set is read in vain
            raise ValueError(f"{options.reference}: {NO_LABELS}")
        samples, source = _samples(options)
        reference, labels = read_all(options.reference)
        evaluation = evaluate_samples(samples, reference, labels, options.seed)
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


def _samples(options: argparse.Namespace) -> tuple[Uint8Image, str]:
    """The samples that the options name, and words about where they come from."""
    if options.run is not None:
        if options.num < 2:
            raise ValueError(f"--num is {options.num}; at least 2 samples are needed")
        try:
            return sample_run(options.run, options.num, options.seed), f"from {options.run} (no file codec)"
        except CheckpointError as error:
            raise ValueError(str(error)) from error
    form = "PNG files, lossless" if options.samples.is_dir() else "no file codec"
    return load_images(options.samples), f"from {options.samples} ({form})"


def _shares(labels: Tensor, num_classes: int) -> tuple[float, ...]:
    counts = torch.bincount(labels, minlength=num_classes).double()
    return tuple((counts / len(labels)).tolist())


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None else str(label)


class _Given(nn.Module):
    """The feature extractor of a metric that is handed features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


if __name__ == "__main__":
    sys.exit(main())
