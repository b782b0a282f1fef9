"""A small classifier, trained on demand, whose features measure samples of data sets unlike Inception's training data.

Its results are not a published metric: they compare runs on one data set, not across data sets.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from data.images.shown import MAX_CHANNELS
from data.storage.errors import UserError
from models.shapes import ImageForm, Uint8Image
from trainer.config.sections import JudgeKind
from trainer.engine.plain import EagerAdam
from trainer.evaluate.networks.features import Seen
from trainer.evaluate.quality import Quality, compare, frechet_distance, statistics_of
from trainer.sample.images import to_uint8

NUM_FEATURES = 64
TRAINING_STEPS = 200
"""Enough to distinguish digits. More steps separate the classes further, and unseen real images then score worse."""
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
EVALUATION_BATCH_SIZE = 256
HELD_OUT_SHARE = 0.2
MIN_IMAGES = 10


class Classifier(nn.Module):
    """Four convolutions, a mean over positions, and one linear layer.

    The first convolution reduces any size to about 16 pixels, so that large images cost little more than small ones.

    Args:
        form: size (8 or more), channels and classes of the images.
    """

    def __init__(self, form: ImageForm) -> None:
        super().__init__()
        self.image_size = form.size
        reduction = max(1, round(form.size / 16))
        self.body = nn.Sequential(
            *_convolution(form.channels, 32, kernel_size=reduction + 2, stride=reduction),
            *_convolution(32, 48, kernel_size=3, stride=2),
            *_convolution(48, NUM_FEATURES, kernel_size=3, stride=2),
            *_convolution(NUM_FEATURES, NUM_FEATURES, kernel_size=3, stride=1),
        )
        self.head = nn.Linear(NUM_FEATURES, form.num_classes)

    def features(self, images: Uint8Image) -> Float[Tensor, "b d"]:
        """The 64 features per image that the last layer reads."""
        return self.body(images.float() / 127.5 - 1.0).mean(dim=(2, 3))

    def forward(self, images: Uint8Image) -> Float[Tensor, "b k"]:
        """Logits of the classes."""
        return self.head(self.features(images))


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """A classifier and its accuracy."""

    model: Classifier
    """In evaluation mode."""
    accuracy: float
    """Share of the held-out images that it classifies correctly."""
    num_held_out: int
    """Number of images held out of training to measure the accuracy: a fifth."""

    @property
    def image_size(self) -> int:
        """Height and width of the images it was trained on."""
        return self.model.image_size

    @torch.no_grad()
    def features(self, images: Uint8Image) -> Float[Tensor, "b d"]:
        """Features of any number of images, float32 [N, 64]."""
        return torch.cat([self.model.features(chunk) for chunk in images.split(EVALUATION_BATCH_SIZE)])

    @torch.no_grad()
    def logits(self, images: Uint8Image) -> Float[Tensor, "b k"]:
        """Logits of any number of images, float32 [N, num_classes]."""
        return torch.cat([self.model(chunk) for chunk in images.split(EVALUATION_BATCH_SIZE)])

    def predict(self, images: Uint8Image) -> Int64[Tensor, " b"]:
        """The most likely class of each image."""
        return self.logits(images).argmax(dim=1)


def train_classifier(
    images: Uint8Image, labels: Int64[Tensor, " b"], *, seed: int, steps: int | None = None
) -> TrainedClassifier:
    """Train on four fifths of the images and measure on the rest; takes some seconds on one CPU core at 16 px.

    The number of steps does not depend on the data set. The result is a function of the arguments, bitwise reproducible
    for one processor type and number of threads. The caller's random state is not changed.

    Args:
        images: uint8 [N, C, H, W] on the CPU, N >= 10, square, 8 px or more.
        labels: int64 [N], 0 or more.
        seed: seed of the split, the initial weights and the batches.
        steps: number of training batches of 64; None: 200, TRAINING_STEPS.

    Raises:
        UserError: the images and labels do not match, or there are too few.
    """
    _check(images, labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        order = torch.randperm(len(images))
        num_held_out = round(len(images) * HELD_OUT_SHARE)
        held_out, training = order[:num_held_out], order[num_held_out:]
        num_classes = int(labels.max()) + 1
        model = Classifier(ImageForm(images.shape[2], images.shape[1], num_classes))
        _fit(model, images, labels, training, TRAINING_STEPS if steps is None else steps)
    result = TrainedClassifier(model=model.eval(), accuracy=0.0, num_held_out=num_held_out)
    right = (result.predict(images[held_out]) == labels[held_out]).double().mean().item()
    return TrainedClassifier(model=model, accuracy=right, num_held_out=num_held_out)


class ClassifierNetwork:
    """The classifier as a network that measures: its 64 features and its logits."""

    kind: JudgeKind = "classifier"

    def __init__(self, classifier: TrainedClassifier, seed: int) -> None:
        self._classifier = classifier
        self.name = f"built-in classifier (seed {seed})"
        digest = hashlib.sha256()
        for value in classifier.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.key = digest.hexdigest()

    def __call__(self, images: Uint8Image) -> Seen:
        """Features [N, 64] and logits [N, num_classes]."""
        return Seen(self._classifier.features(images), self._classifier.logits(images))


def _convolution(c_in: int, c_out: int, *, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(c_in, c_out, kernel_size, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(c_out), nn.ReLU()


def _fit(model: Classifier, images: Uint8Image, labels: Tensor, training: Tensor, steps: int) -> None:
    """Adam with a one-cycle learning rate; each epoch is a new permutation, and batches may span two epochs."""
    epochs = -(-steps * BATCH_SIZE // len(training))
    plan = torch.cat([training[torch.randperm(len(training))] for _ in range(epochs)])
    optimizer = EagerAdam(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    model.train()
    for batch in plan[: steps * BATCH_SIZE].split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()


def _check(images: Tensor, labels: Tensor) -> None:
    square = images.ndim == 4 and images.shape[2] == images.shape[3] >= 8
    if images.dtype != torch.uint8 or not square or not 1 <= images.shape[1] <= MAX_CHANNELS:
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}, the classifier takes uint8 [N, C, H, W] with C = 1 to "
            f"{MAX_CHANNELS} and H = W of at least 8"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(f"labels are {labels.dtype} {list(labels.shape)}, expected int64 [{len(images)}]")
    if len(images) < MIN_IMAGES:
        raise UserError(f"{len(images)} images are too few to train a classifier on, it needs at least {MIN_IMAGES}")
    if int(labels.min()) < 0:
        raise UserError(f"labels contain {int(labels.min())}, classes count from 0")


NO_LABELS = (
    "the reference has no labels, so no classifier can be trained to measure in: evaluate on a labelled data set, "
    "or write the samples to a .npz file and give it to an FID program"
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results for one set of samples."""

    num_samples: int
    """Number of samples, and of noise images."""
    num_reference: int
    """Number of reference images; all are used."""
    seed: int
    """Seed of the classifier and of the noise."""
    classifier_accuracy: float
    """Share of the held-out reference images that the classifier labels correctly."""
    num_held_out: int
    """Number of held-out reference images, a fifth."""
    frechet_samples: float
    """Fréchet distance between samples and reference in the classifier's features."""
    frechet_noise: float
    """The same for noise: N(0, 1) clipped to [-1, 1]."""
    class_shares: tuple[float, ...]
    """Share of each class among the samples, by the classifier; they sum to 1."""
    reference_class_shares: tuple[float, ...]
    """Share of each class in the reference, by its labels."""
    quality: Quality | None = None
    """Figures in the classifier's features."""
    agreement: float | None = None
    """Share of the samples that the classifier assigns to the requested class; None if no class was requested."""
    class_agreement: dict[int, float] | None = None
    """The same for each requested class."""

    @property
    def ratio(self) -> float:
        """Distance of the samples over that of noise: 1 for noise, above 1 if the samples contain only a few classes.

        Real images that the classifier has not seen do not reach 0: 397 digits give 0.02 or 0.03, 100 digits 0.08.
        """
        return self.frechet_samples / self.frechet_noise


def evaluate_samples(
    samples: Uint8Image | Iterable[Uint8Image],
    reference: UInt8[Tensor, "m c h w"],
    labels: Int64[Tensor, " m"] | None,
    seed: int,
    asked: Int64[Tensor, " n"] | None = None,
    classifier: TrainedClassifier | None = None,
) -> Evaluation:
    """Measure samples against a labelled reference; takes some seconds on a CPU at 16 px.

    Args:
        samples: uint8 [N, C, H, W], N > 1; or such tensors one after another, of which only one need be in memory.
        reference: uint8 [M, C, H, W], M >= 10.
        labels: int64 [M], counted from 0; None is refused.
        seed: for classifier and noise, 0 or more.
        asked: the class requested for each sample, if any.
        classifier: trained on this reference with this seed; None: train it here.

    Raises:
        UserError: no labels, too few images, or samples whose shape differs from the reference's.
    """
    if labels is None:
        raise UserError(NO_LABELS)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}, expected 0 to 2**63 - 1")
    batches = iter(samples.split(EVALUATION_BATCH_SIZE) if isinstance(samples, Tensor) else samples)
    first = next(batches)  # looked at before the classifier is trained
    if first.dtype != torch.uint8 or first.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"the samples are {first.dtype} {list(first.shape)}, the reference is {reference.dtype} "
            f"{list(reference.shape)}: channels, height and width must be equal and all uint8"
        )
    classifier = classifier or train_classifier(reference, labels, seed=seed)
    reference_features = classifier.features(reference)
    seen = [(classifier.features(batch), classifier.logits(batch)) for batch in itertools.chain([first], batches)]
    features, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    if len(features) < 2:
        raise UserError(
            f"{len(features)} sample has no covariance: give at least 2, better as many as the reference has"
        )
    noise = (len(features), *first.shape[1:])
    noise_features = torch.cat([classifier.features(batch) for batch in noise_batches(noise, seed=seed)])
    quality = compare(features, reference_features, logits=logits, seed=seed)
    num_classes, predicted = int(labels.max()) + 1, logits.argmax(dim=1)
    agreement, class_agreement = (None, None) if asked is None else _agreement(predicted, asked)
    return Evaluation(
        num_samples=len(features),
        num_reference=len(reference),
        seed=seed,
        classifier_accuracy=classifier.accuracy,
        num_held_out=classifier.num_held_out,
        frechet_samples=quality.fid,
        frechet_noise=frechet_distance(statistics_of(noise_features), statistics_of(reference_features)),
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
    """All images of `noise_batches`."""
    return torch.cat(list(noise_batches(shape, seed=seed)))


def noise_batches(shape: Sequence[int], *, seed: int) -> Iterator[Uint8Image]:
    """Images of independent N(0, 1) pixels, clipped to [-1, 1]: the output of a run that has learnt nothing."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, shape[0], EVALUATION_BATCH_SIZE):
        number = min(EVALUATION_BATCH_SIZE, shape[0] - first)
        yield to_uint8(torch.randn((number, *shape[1:]), generator=generator))


def _shares(labels: Tensor, num_classes: int) -> tuple[float, ...]:
    counts = torch.bincount(labels, minlength=num_classes).double()
    return tuple((counts / len(labels)).tolist())
