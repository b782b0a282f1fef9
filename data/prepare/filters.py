"""Leaves out images by their columns, size, shape or likeness, before anything is prepared.

Processes look at a few images each. What is taken away is decided here from what all of them saw, in the order of the
source, so that it depends neither on their number nor on restarts.
"""

import argparse
import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from rich.console import Console

from data.images.channels import decode_array
from data.images.decode import BadImageError, ImageFile
from data.images.perceptual import near_pairs, perceptual_hash
from data.images.shown import mean_of_channels
from data.prepare.columns import ShardImages, by_shard, rows_of, with_columns
from data.prepare.encode import MAX_PIXELS, refusals
from data.prepare.where import Condition, MissingError
from data.sets.terminal import progress_bar
from data.sources.source import Item, Source, SourceError, shown_name
from data.sources.tars import TarSource

Dedup = Literal["exact", "perceptual"]
_CHUNK_ITEMS = 32
_LISTED_COLUMNS = 40
_T = TypeVar("_T")
MapInOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Generator[Any, None, None]]
"""Does picklable tasks and yields the results in their order, such as `map_in_order`."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which images are taken; None does not filter. They apply in this order."""

    where: str | None = None
    """Condition on the columns, see `Condition`. An image without a value for one of them is left out."""
    min_side: int | None = None
    """Pixels that the short side of the original has at least."""
    max_aspect: float | None = None
    """Long side divided by short side at most, 1 or more."""
    dedup: Dedup | None = None
    """exact: of files with equal bytes the first is taken; perceptual: of near-duplicates too."""

    def recorded(self) -> dict[str, int | float | str | bool | None]:
        """The filters that are set, as index.json keeps them."""
        given = {
            "where": self.where,
            "min_side": self.min_side,
            "max_aspect": self.max_aspect,
            "dedup": self.dedup,
        }
        return {name: value for name, value in given.items() if value is not None}

    def __bool__(self) -> bool:
        return bool(self.recorded())


class Removed(NamedTuple):
    """What one filter took away."""

    option: str
    num_images: int
    num_missing: int = 0
    """Of these, images without a value."""

    @property
    def text(self) -> str:
        """For the summary."""
        missing = f", {self.num_missing} of them without a value" if self.num_missing else ""
        return f"{self.option}: {self.num_images}{missing}"


class _Seen(NamedTuple):
    """What a process saw of an image."""

    short: int
    long: int
    content: int | None
    """Hash of its bytes."""
    picture: int | None
    """Perceptual hash."""


def aspect(text: str) -> float:
    """A type for argparse: a number of 1 or more."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a number of 1 or more")
    return value


def apply_filters(source: Source, filters: Filters, run: MapInOrder, console: Console) -> tuple[Source, list[Removed]]:
    """The source with the images that are taken, and what each filter took away.

    Images that cannot be read or decoded stay: they are unusable, which `--max-bad` is about.

    Args:
        source: the images, all of which are read unless only `where` is set.
        filters: what to leave out.
        run: does the tasks that look at images.
        console: shows the progress bar.

    Raises:
        SourceError: a column is unknown, the source has none, or no image is left.
    """
    items, removed = list(source.items), list[Removed]()
    if filters.where is not None:
        items = _filter_rows(with_columns(source), Condition(filters.where), items, removed, run, console)
    if filters.min_side or filters.max_aspect or filters.dedup:
        seen = _look(source, filters.dedup, items, run, console)
        items = _filter_images(filters, items, seen, removed)
    if not items:
        told = "; ".join(line.text for line in removed)
        raise SourceError(f"source {source.description}: no image is left of {len(source.items)}: {told}")
    kept: Any = source
    return replace(kept, items=tuple(items)), removed


def _filter_rows(
    source: TarSource,
    condition: Condition,
    items: list[Item],
    removed: list[Removed],
    run: MapInOrder,
    console: Console,
) -> list[Item]:
    tasks = list(by_shard(items))
    verdicts: list[bool | None] = []
    columns: set[str] = set()
    for found, seen in _results(partial(_judge, source, condition), tasks, run, "reading columns", console):
        verdicts += found
        columns |= seen
    if unknown := [name for name in condition.columns if name not in columns]:
        known = sorted(columns)
        rest = f" and {len(known) - _LISTED_COLUMNS} more" if len(known) > _LISTED_COLUMNS else ""
        there = f"there are: {', '.join(map(shown_name, known[:_LISTED_COLUMNS]))}{rest}" if known else "there are none"
        raise SourceError(f"source {source.description}: --where: there is no column {', '.join(unknown)}; {there}")
    kept = [item for item, verdict in zip(items, verdicts, strict=True) if verdict]
    removed.append(Removed(f"--where {condition.text!r}", len(items) - len(kept), verdicts.count(None)))
    return kept


def _judge(source: TarSource, condition: Condition, images: ShardImages) -> tuple[list[bool | None], set[str]]:
    """For each image of a shard whether it is taken, None without a value; and the columns of all."""
    verdicts: list[bool | None] = []
    columns: set[str] = set()
    for row in rows_of(source, images):
        columns.update(row)
        try:
            verdicts.append(condition.holds(row))
        except MissingError:
            verdicts.append(None)
    return verdicts, columns


def _look(
    source: Source, dedup: Dedup | None, items: list[Item], run: MapInOrder, console: Console
) -> list[_Seen | None]:
    """What is seen of each image; None for one that cannot be used."""
    chunks = [items[place : place + _CHUNK_ITEMS] for place in range(0, len(items), _CHUNK_ITEMS)]
    work = partial(_look_at_items, source, dedup)
    return [seen for some in _results(work, chunks, run, "looking at images", console) for seen in some]


def _look_at_items(source: Source, dedup: Dedup | None, items: list[Item]) -> list[_Seen | None]:
    return [_look_at(source, dedup, item) for item in items]


def _look_at(source: Source, dedup: Dedup | None, item: Item) -> _Seen | None:
    try:
        content = source.read(item)
        with refusals(content, MAX_PIXELS):
            array, picture = decode_array(content, max_pixels=MAX_PIXELS), None
            file = ImageFile(content) if array is None else mean_of_channels(array)
            if dedup == "perceptual" and file.size[0] * file.size[1] <= MAX_PIXELS:
                picture = perceptual_hash(file.decode(keep_colours=True) if isinstance(file, ImageFile) else file)
            hashed = _hash(content + source.read_condition(item)) if dedup else None
            return _Seen(min(file.size), max(file.size), hashed, picture)
    except (OSError, BadImageError):
        return None


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest())


def _filter_images(
    filters: Filters, items: list[Item], seen: Sequence[_Seen | None], removed: list[Removed]
) -> list[Item]:
    left = list(range(len(items)))

    def keep(option: str, is_kept: Callable[[int, _Seen], bool]) -> None:
        nonlocal left
        before = len(left)
        left = [place for place in left if (image := seen[place]) is None or is_kept(place, image)]
        removed.append(Removed(option, before - len(left)))

    if (min_side := filters.min_side) is not None:
        keep(f"--min-side {min_side}", lambda _, image: image.short >= min_side)
    if (max_aspect := filters.max_aspect) is not None:
        keep(f"--max-aspect {max_aspect:g}", lambda _, image: image.long <= max_aspect * image.short)
    if filters.dedup:
        firsts = {image.content: place for place in reversed(left) if (image := seen[place])}
        keep("--dedup exact", lambda place, image: firsts[image.content] == place)
    if filters.dedup == "perceptual":
        taken = _far_firsts(
            {place: image.picture for place in left if (image := seen[place]) and image.picture is not None}
        )
        keep("--dedup perceptual", lambda place, image: image.picture is None or place in taken)
    return [items[place] for place in left]


def _far_firsts(hashes: dict[int, int]) -> set[int]:
    """The places of the images that are taken: none is near to one that is taken before it.

    Args:
        hashes: hash by place, in ascending order of the places.
    """
    places = np.array(list(hashes), dtype=np.int64)
    values, firsts = np.unique(np.array(list(hashes.values()), dtype=np.uint64), return_index=True)
    pairs = near_pairs(values, values)
    begins, ends = (np.searchsorted(pairs[:, 0], np.arange(len(values)), side=side) for side in ("left", "right"))
    is_taken = np.zeros(len(values), dtype=np.bool_)
    for value in np.argsort(firsts).tolist():
        is_taken[value] = not is_taken[pairs[begins[value] : ends[value], 1]].any()
    return set(places[firsts[is_taken]].tolist())


def _results(
    work: Callable[[_T], Any], tasks: Sequence[_T], run: MapInOrder, title: str, console: Console
) -> Generator[Any, None, None]:
    with progress_bar(console) as progress, contextlib.closing(run(work, tasks)) as results:
        yield from progress.track(results, total=len(tasks), description=title)
