"""Near-duplicates between two prepared data sets, such as images of a test set that are trained on as well."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from data.images.perceptual import NEAR_BITS, Hashes, near_pairs, perceptual_hash
from data.images.shown import PICTURE_CHANNELS, mean_of_channels
from data.processes.pool import map_in_order
from data.sets.terminal import progress_bar
from data.shards.decode import decode_into
from data.shards.files import shard_files
from data.shards.grid import lay_out
from data.shards.index import ShardIndex
from data.shards.reader import BadSampleError, ShardReader
from data.storage.files import replaced
from data.storage.location import DataError

_CACHE_GB = 50.0
_SHOWN_PAIRS = 32
_PAIRS_IN_A_ROW = 4
_SIDE_PIXELS = 128
"""Height and width of an image on the sheet."""


class Place(NamedTuple):
    """Where an image is in a data set."""

    shard: int
    sample: int


class NearPair(NamedTuple):
    """An image, and the image of the other data set that is closest to it."""

    place: Place
    other: Place
    bits: int
    """Bits in which their hashes differ, 0 to `NEAR_BITS`."""


def find_near(index: ShardIndex, other: ShardIndex, workers: int, console: Console) -> list[NearPair]:
    """The images of a data set that have a near-duplicate in another one, in their order.

    Images are read shard by shard; 16 bytes are kept for each image of `other`. Damaged images are left out.

    Args:
        index: the data set.
        other: what it is compared with; sizes and channels may differ.
        workers: processes that decode.
        console: shows the progress bar.

    Raises:
        DataError: a shard is damaged, or one of them has points instead of images.
    """
    for each in (index, other):
        if each.has_points:
            raise DataError(f"{each.shown_location} holds points of the plane, which have no near-duplicates")
    pairs: list[NearPair] = []
    with progress_bar(console) as progress:
        task = progress.add_task("comparing images", total=index.num_samples + other.num_samples)
        hashes, places = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.uint32)]
        for number, (samples, of_shard) in enumerate(_hashes(other, workers)):
            hashes.append(of_shard)
            places.append(np.array([(number, sample) for sample in samples], dtype=np.uint32).reshape(-1, 2))
            progress.advance(task, other.shards[number].num_samples)
        known, firsts = np.unique(np.concatenate(hashes), return_index=True)
        known_places = np.concatenate(places)[firsts]
        for number, (samples, of_shard) in enumerate(_hashes(index, workers)):
            values, inverse = np.unique(of_shard, return_inverse=True)
            closest: dict[int, tuple[int, int]] = {}
            for left, right in near_pairs(values, known).tolist():
                bits = int(np.bitwise_count(values[left] ^ known[right]))
                closest[left] = min(closest.get(left, (NEAR_BITS + 1, 0)), (bits, right))
            for sample, left in zip(samples, inverse.tolist(), strict=True):
                if left in closest:
                    bits, right = closest[left]
                    pairs.append(NearPair(Place(number, sample), Place(*known_places[right].tolist()), bits))
            progress.advance(task, index.shards[number].num_samples)
    return pairs


def _hashes(index: ShardIndex, workers: int) -> Iterator[tuple[list[int], Hashes]]:
    """For each shard, the samples that can be decoded, and their hashes."""
    work = partial(_hash_shard, index)
    with contextlib.closing(map_in_order(work, range(len(index.shards)), min(workers, len(index.shards)))) as results:
        yield from results


def _hash_shard(index: ShardIndex, number: int) -> tuple[list[int], Hashes]:
    samples: list[int] = []
    hashes: list[int] = []
    with (
        contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB)) as files,
        contextlib.closing(ShardReader(files.open, index.shards[number])) as reader,
    ):
        for sample in range(index.shards[number].num_samples):
            with contextlib.suppress(BadSampleError):
                hashes.append(perceptual_hash(_picture(index, reader, sample)))
                samples.append(sample)
    return samples, np.array(hashes, dtype=np.uint64)


def _picture(index: ShardIndex, reader: ShardReader, sample: int) -> Image.Image:
    """An image, without what is given with it."""
    pixels = np.empty(index.pixels_shape, dtype=np.uint8)
    decode_into(pixels, reader.read(sample))
    C = index.image_channels
    if C not in PICTURE_CHANNELS:
        return mean_of_channels(pixels[..., :C])
    return Image.fromarray(pixels[..., 0] if C == 1 else np.ascontiguousarray(pixels[..., :C]))


def describe_near(index: ShardIndex, other: ShardIndex, pairs: Sequence[NearPair]) -> list[str]:
    """Lines on the pairs that `find_near` found: how many, and the first of them with their keys."""
    lines = [
        f"near          {len(pairs)} of {index.num_samples} images have a near-duplicate among the "
        f"{other.num_samples} of {other.shown_location} (at most {NEAR_BITS} of 64 bits differ)"
    ]
    for pair, (key, other_key) in zip(pairs, _keys(index, other, pairs[:_SHOWN_PAIRS]), strict=False):
        where = f"{index.shards[pair.place.shard].name} {key} and {other.shards[pair.other.shard].name} {other_key}"
        lines.append(f"  {pair.bits} bits  {where}")
    if len(pairs) > _SHOWN_PAIRS:
        lines.append(f"  and {len(pairs) - _SHOWN_PAIRS} more")
    return lines


def _keys(index: ShardIndex, other: ShardIndex, pairs: Sequence[NearPair]) -> list[tuple[str, str]]:
    ours, theirs = (
        [reader.read(place.sample).key for reader, place in _readers(each, places)]
        for each, places in ((index, [x.place for x in pairs]), (other, [x.other for x in pairs]))
    )
    return list(zip(ours, theirs, strict=True))


def _readers(index: ShardIndex, places: Sequence[Place]) -> Iterator[tuple[ShardReader, Place]]:
    with contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB)) as files:
        for place in places:
            with contextlib.closing(ShardReader(files.open, index.shards[place.shard])) as reader:
                yield reader, place


def draw_near(index: ShardIndex, other: ShardIndex, pairs: Sequence[NearPair], file: Path) -> int:
    """Write a PNG with the first pairs, each image left of its near-duplicate; return how many are on it.

    Raises:
        OSError: it cannot be written.
    """
    shown = pairs[:_SHOWN_PAIRS]
    ours = [_square(index, reader, place) for reader, place in _readers(index, [pair.place for pair in shown])]
    theirs = [_square(other, reader, place) for reader, place in _readers(other, [pair.other for pair in shown])]
    images = np.concatenate([np.concatenate(both, axis=1)[None] for both in zip(ours, theirs, strict=True)])
    sheet = lay_out(images, columns=min(_PAIRS_IN_A_ROW, len(images)), min_width=0)
    with replaced(file) as draft:
        Image.fromarray(sheet).save(draft, "PNG")
    return len(shown)


def _square(index: ShardIndex, reader: ShardReader, place: Place) -> npt.NDArray[np.uint8]:
    """An image in RGB at the size of the sheet, uint8 [side, side, 3]."""
    picture = _picture(index, reader, place.sample).convert("RGB")
    enlarged = Image.Resampling.NEAREST if index.image_size < _SIDE_PIXELS else Image.Resampling.LANCZOS
    return np.asarray(picture.resize((_SIDE_PIXELS, _SIDE_PIXELS), enlarged))
