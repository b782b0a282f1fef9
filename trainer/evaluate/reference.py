"""Measures samples against a reference in a network's features, over all ranks, in batches; the reference is kept."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from data.shards.decode import decode_into
from data.shards.files import shard_files
from data.shards.index import INDEX_NAME, ShardIndex, load_index
from data.shards.reader import samples_in_order
from data.shards.verification import verify_shards
from data.storage.errors import OperationError, UserError
from data.storage.location import DataError, is_remote, local_path
from data.stream.pipeline import DataConfig
from models.shapes import Uint8Image
from trainer.config.sections import JudgeKind
from trainer.engine.ranks import Ranks
from trainer.evaluate.kept import keep_cached, load_beside, load_cached, load_statistics
from trainer.evaluate.networks.features import Codec, FeatureNetwork, Seen, through
from trainer.evaluate.quality import (
    Features,
    Quality,
    Statistics,
    compare,
    frechet_distance_at_infinity,
    min_samples_for_infinity,
    named,
)
from trainer.sample.images import StoredImages, open_images

BATCH_SIZE = 64
Numbered = Iterable[tuple[int, Uint8Image]]
FAILURES: tuple[type[Exception], ...] = (DataError, UserError, OperationError, OSError)
"""What one rank alone may meet where it reads or makes images."""


class FeaturesError(UserError):
    """Features that nothing can be measured in; the message says whose."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures, and what they were measured on, which is always given with them."""

    quality: Quality
    """The figures."""
    num_samples: int
    """Number of samples."""
    num_reference: int
    """Number of reference images; 0 if unknown."""
    network: str
    """Name of the feature network."""
    judge: JudgeKind
    """Its kind."""
    through: Codec
    """File format applied to the samples before measuring."""
    infinity: float | None = None
    """Fréchet distance extrapolated to infinitely many samples; None: not asked for."""

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures by the names that the network allows."""
        figures = named(self.quality, self.judge)
        if self.infinity is not None:
            figures[f"{next(iter(figures))}_infinity"] = self.infinity  # the Fréchet distance is the first figure
        return figures


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference that samples are compared with."""

    seen: Seen | Statistics
    """Features of all images, or only statistics."""
    num_images: int
    """Number of reference images."""
    key: str
    """SHA-256 of the data set's index, of the pixels, or of the statistics."""
    is_beside: bool = False
    """Whether its features were read from a file beside the prepared data set."""

    @property
    def compared(self) -> Features | Statistics:
        """What samples are compared with."""
        return self.seen if isinstance(self.seen, Statistics) else self.seen.features

    @property
    def num_features(self) -> int:
        """Features of an image."""
        compared = self.compared
        return len(compared.mean) if isinstance(compared, Statistics) else compared.shape[1]


def pairs_of(reference: str | Path) -> str | Path | None:
    """The reference, if it is a prepared data set of pairs: samples of a model that translates are drawn for these.

    Raises:
        DataError: its index is wrong.
    """
    return reference if is_prepared(reference) and load_index(reference).condition_channels else None


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a data set prepared by `data.prepare`; of a URL, it must be."""
    return is_remote(path) or (local_path(path) / INDEX_NAME).is_file()


def load_reference(path: str | Path, network: FeatureNetwork, ranks: Ranks | None, cache: Path) -> Reference:
    """Features of a reference; a collective if there are ranks.

    They are read from beside the prepared data set if `keep_beside` wrote them there, else from the cache, else
    computed and cached.

    Args:
        path: a prepared data set, also at a URL, a folder of PNGs or an .npz of images; or an .npz with `mu` and
            `sigma`, the usual format for statistics.
        network: computes the features; not used for statistics or cached features.
        ranks: share the work; None: only this process.
        cache: folder of cached features.

    Raises:
        UserError: `path` is none of these.
        DataError: a prepared data set is damaged.
    """
    here = None if is_remote(path) else local_path(path)
    if here and here.suffix == ".npz" and (statistics := load_statistics(here)):
        key = hashlib.sha256(here.read_bytes()).hexdigest()
        return Reference(seen=statistics, num_images=statistics.num_images, key=key)

    def opened() -> tuple[ShardIndex | None, Numbered, str, int]:
        if here is None or is_prepared(here):
            index = load_index(path)
            return index, _prepared(index), index.digest, index.num_samples
        images = open_images(here)
        return None, enumerate(images.batches(BATCH_SIZE)), pixels_sha256(images), images.num

    index, batches, digest, num_images = ranks.all_do(opened, *FAILURES) if ranks else opened()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    file = cache / f"{digest[:24]}-{network.key[:24]}.npz"
    features = load_beside(here, digest, network) if here and index and rank == 0 else None
    is_beside = features is not None
    if features is None and rank == 0:
        features = load_cached(file)
    if ranks is not None:
        features = ranks.broadcast(features)  # ranks on other hosts may not have access to the folder
    if features is not None and len(features) == num_images:
        return Reference(seen=Seen(features, None), num_images=num_images, key=digest, is_beside=is_beside)
    seen = see_over_ranks(network, ((i, x) for i, x in batches if i % world_size == rank), ranks)
    if rank == 0:
        keep_cached(file, seen.features)
    return Reference(seen=seen, num_images=num_images, key=digest)


def evaluate_against(
    batches: Numbered, reference: Reference, network: FeatureNetwork, ranks: Ranks | None, *, codec: Codec, seed: int
) -> Measured:
    """Measure samples. A collective; every rank gets the result.

    Args:
        batches: this rank's batches, each with its number over all ranks, so the result is independent of the ranks.
        reference: from `load_reference`.
        network: as used there.
        ranks: as there.
        codec: file format applied to the samples first.
        seed: for random subsets and splits.

    Raises:
        FeaturesError: features are not finite.
        UserError: the network does not fit the images or the reference.
    """
    return measure(see_samples(batches, network, ranks, codec=codec), reference, network, codec=codec, seed=seed)


def see_samples(batches: Numbered, network: FeatureNetwork, ranks: Ranks | None, *, codec: Codec) -> Seen:
    """Features of samples after a file format; the first half of `evaluate_against`. A collective."""
    passed = through(codec)
    return see_over_ranks(network, ((number, passed(images)) for number, images in batches), ranks)


def check_infinity(num_samples: int, reference: Reference) -> None:
    """Refuse an extrapolation from too few samples, before they are drawn.

    Raises:
        UserError: there are too few.
    """
    if num_samples < (least := min_samples_for_infinity(reference.num_features)):
        raise UserError(
            f"--infinity extrapolates from at least {least} samples, four for each of {reference.num_features} "
            f"features, and {num_samples} are given: measure more, or leave --infinity out"
        )


def measure(
    seen: Seen, reference: Reference, network: FeatureNetwork, *, codec: Codec, seed: int, infinity: bool = False
) -> Measured:
    """Figures of samples that were seen, with `infinity` also the extrapolated one; the rest of `evaluate_against`."""
    held, width = reference.compared, reference.num_features
    for number, what in ((len(seen.features), "sample"), (reference.num_images, "image as the reference")):
        if number == 1:
            raise UserError(f"1 {what} has no covariance: give at least 2")
    if seen.features.shape[1] != width:
        raise UserError(
            f"the reference has {width} features, {network.name} gives {seen.features.shape[1]}: the statistics are of "
            "another network"
        )
    of_reference = torch.stack([held.mean, held.covariance.diagonal()]) if isinstance(held, Statistics) else held
    for values, what in ((seen.features, "the samples"), (of_reference, "the reference")):
        if not values.isfinite().all():  # a distance would come out as 0, the best value
            raise FeaturesError(
                f"features of {what} are not finite, by {network.name}: nothing can be measured in them"
            )
    return Measured(
        quality=compare(seen.features, held, logits=seen.logits, seed=seed),
        num_samples=len(seen.features),
        num_reference=reference.num_images,
        network=network.name,
        judge=network.kind,
        through=codec,
        infinity=frechet_distance_at_infinity(seen.features, held, seed=seed) if infinity else None,
    )


def see_over_ranks(network: FeatureNetwork, batches: Numbered, ranks: Ranks | None) -> Seen:
    """Features of all ranks' batches in the order of their numbers. A collective; every rank gets the result.

    Raises:
        UserError, OperationError, OSError: on every rank, if one cannot make or read its images.
    """

    def see() -> list[tuple[int, Seen]]:
        return [(number, network(images)) for number, images in batches]

    mine = ranks.all_do(see, *FAILURES) if ranks else see()
    if ranks:
        sent = [(number, seen.features, seen.logits) for number, seen in mine]
        mine = [(number, Seen(x, logits)) for of_rank in ranks.gather(sent) for number, x, logits in of_rank]
    parts = [seen for _, seen in sorted(mine, key=lambda part: part[0])]
    if not parts:
        raise UserError("there are no images to measure")
    logits = [seen.logits for seen in parts if seen.logits is not None]
    return Seen(torch.cat([seen.features for seen in parts]), torch.cat(logits) if logits else None)


def pick_images(path: Path, numbers: Sequence[int]) -> Uint8Image:
    """Some images of a reference, by their numbers in the order of its features; repeated numbers are allowed.

    Args:
        path: as for `load_reference`, but no statistics.
        numbers: at least one.

    Returns:
        uint8 [N, C, H, W] in the order of `numbers`.

    Raises:
        DataError, UserError: a file is missing or damaged.
    """
    batches = _prepared(load_index(path)) if is_prepared(path) else enumerate(open_images(path).batches(BATCH_SIZE))
    wanted, found = set(numbers), dict[int, Uint8Image]()
    for number, images in batches:
        first = number * BATCH_SIZE
        found |= {i: images[i - first] for i in range(first, first + len(images)) if i in wanted}
    return torch.stack([found[i] for i in numbers])


def pixels_sha256(images: StoredImages) -> str:
    """SHA-256 of the pixels of all images, as uint8 [N, C, H, W]."""
    digest = hashlib.sha256()
    for batch in images.batches(BATCH_SIZE):
        digest.update(batch.numpy().tobytes())
    return digest.hexdigest()


def read_all(index_path: str | Path) -> tuple[Uint8Image, Int64[Tensor, " b"] | None]:
    """Decode every image of a prepared data set into memory, in index order.

    Args:
        index_path: folder that contains index.json and the shards.

    Returns:
        uint8 [N, C, H, W], without what pairs are given with, and labels int64 [N] or None if the data set has none.

    Raises:
        DataError: a file is missing or damaged.
    """
    index = load_index(index_path)
    verify_shards(index, by="size", cache_directory=None)
    images = np.empty((index.num_samples, *index.pixels_shape), dtype=np.uint8)
    labels: list[int] = []
    with closing(shard_files(index, cache_directory=None, cache_gb=DataConfig.cache_gb)) as files:
        for out, sample in zip(images, samples_in_order(index.shards, files.open), strict=True):
            decode_into(out, sample)
            labels.append(-1 if sample.label is None else sample.label)
    pixels = torch.from_numpy(images[..., : index.image_channels]).permute(0, 3, 1, 2).contiguous()
    return pixels, None if index.num_classes is None else torch.tensor(labels)


def _prepared(index: ShardIndex) -> Iterator[tuple[int, Uint8Image]]:
    """Batches of a prepared data set, in index order."""
    verify_shards(index, by="size", cache_directory=None)
    with closing(shard_files(index, cache_directory=None, cache_gb=DataConfig.cache_gb)) as files:
        pixels = np.empty((BATCH_SIZE, *index.pixels_shape), dtype=np.uint8)
        for i, sample in enumerate(samples_in_order(index.shards, files.open)):
            decode_into(pixels[i % BATCH_SIZE], sample)
            if i % BATCH_SIZE == BATCH_SIZE - 1 or i == index.num_samples - 1:
                images = torch.from_numpy(pixels[: i % BATCH_SIZE + 1, ..., : index.image_channels].copy())
                yield i // BATCH_SIZE, images.permute(0, 3, 1, 2).contiguous()
