"""Pairs for image-to-image translation: images, and the image that is given with each."""

import hashlib
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data.sources.arrays import ArraySource, digits_source
from data.sources.classes import Classes
from data.sources.files import FolderSource, WhyToSkip, ZipSource, folder_source, zip_source
from data.sources.kinds import HIDDEN, LINK, REPLACED, Reason, Skips, reason_to_skip, reason_to_skip_no_array
from data.sources.source import (
    BaseSource,
    FormDefaults,
    Item,
    Skipped,
    Source,
    SourceError,
    State,
    exists,
    filled,
    pixel_file,
)
from data.sources.tars import SIDECAR_SUFFIXES, find_shards, members_of, read_member
from data.storage.redaction import redact

Side = Literal["left", "right"]
PREFIX = "pairs:"
REDUCED, BLURRED = "digits4x", "digitsblur"
"""Pairs that need no download: the digits, given at 4 px or blurred."""
_LACKS = "has no partner of this name in"
_OTHER = Reason("has another suffix", False)
_LISTED = 8
_DIGITS_REDUCTION = 2
"""From 8 to 4 px, a quarter of the 16 px that digits are prepared with."""
_DIGITS_BLUR = (1, 4, 6, 4, 1)
"""A binomial filter, in both directions: a standard deviation of 1 of 8 px, 2 of the 16 px."""


@dataclass(frozen=True, kw_only=True)
class PairsSource(BaseSource):
    """Images of one source, each with the one of the same name of another."""

    images: Source
    conditions: Source | None
    """None: each file holds both, side by side."""
    suffix: str = ""
    """Of most conditions."""
    other_suffixes: dict[str, str] = field(default_factory=dict)
    """Of the others, by their name without suffix."""

    @property
    def description(self) -> str:
        """`pairs:CONDITIONS:IMAGES`, the names of both."""
        names = (self.images,) if self.conditions is None else (self.conditions, self.images)
        return PREFIX + ":".join(source.description.partition(":")[2] for source in names)

    def read(self, item: Item) -> bytes:
        """The file of the image."""
        return self.images.read(item)

    def read_condition(self, item: Item) -> bytes:
        """The file of what is given with it."""
        if self.conditions is None:
            return b""
        stem = _stem(item.name)
        return self.conditions.read(item._replace(name=stem + self.other_suffixes.get(stem, self.suffix)))


@dataclass(frozen=True, kw_only=True)
class DegradedDigits(ArraySource):
    """The digits of scikit-learn, each given in a degraded form."""

    degrade: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    """Grey levels [8, 8] to [S, S]."""

    def read_condition(self, item: Item) -> bytes:
        """The degraded digit, as a PGM file."""
        degraded = self.degrade(self.pixels[int(item.name), :, :, 0].astype(np.int64))
        return pixel_file(degraded.astype(np.uint8).tobytes(), size=len(degraded), channels=1)


def _reduced(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    side = len(pixels) // _DIGITS_REDUCTION
    sums = pixels.reshape(side, _DIGITS_REDUCTION, side, _DIGITS_REDUCTION).sum(axis=(1, 3))
    return (sums + _DIGITS_REDUCTION**2 // 2) // _DIGITS_REDUCTION**2


def _blurred(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    reach = len(_DIGITS_BLUR) // 2
    for axis in (0, 1):
        windows = sliding_window_view(np.pad(pixels, reach, mode="edge"), len(_DIGITS_BLUR), axis)
        pixels = (windows @ np.array(_DIGITS_BLUR)).take(np.arange(len(pixels)) + reach, 1 - axis)
    total = sum(_DIGITS_BLUR) ** 2
    return (pixels + total // 2) // total


@dataclass(frozen=True, kw_only=True)
class TarPairsSource(BaseSource):
    """Pairs in tar files of one folder, members of one key.

    An item's name is `SHARD@OFFSET+SIZE@OFFSET+SIZE/MEMBER`: where the image is, where the condition is, and the image.
    """

    description: str
    folder: Path

    def read(self, item: Item) -> bytes:
        """The file of the image."""
        return self._read(item, 0)

    def read_condition(self, item: Item) -> bytes:
        """The file of what is given with it."""
        return self._read(item, 1)

    def _read(self, item: Item, which: int) -> bytes:
        shard, *places = item.name.partition("/")[0].rsplit("@", 2)
        offset, size = places[which].split("+")
        return read_member(self.folder / shard, int(offset), int(size))


def degraded_digits_source(name: str) -> DegradedDigits:
    """The digits at 16 px, each with itself at 4 px (`REDUCED`) or blurred; raises what `digits_source` raises."""
    digits = digits_source()
    return DegradedDigits(
        items=digits.items,
        class_names=digits.class_names,
        defaults=digits.defaults._replace(condition_channels=1),
        state=digits.state,
        description=name,
        load=digits.load,
        degrade=_reduced if name == REDUCED else _blurred,
    )


def pairs_source(name: str, *, condition_half: Side | None, classes: Classes) -> PairsSource | TarPairsSource:
    """List the pairs of two folders or zip files, of tar files, or of images that hold both side by side.

    Args:
        name: pairs:CONDITIONS:IMAGES, pairs:TARS:SUFFIX:SUFFIX, or pairs:FOLDER with `condition_half`.
        condition_half: the half that is given; None: there are two folders.
        classes: how the folders of the images are taken; auto: as no classes.

    Raises:
        SourceError: one of them is missing or holds no images, or most images have no partner.
    """
    classes = "none" if classes == "auto" else classes
    if condition_half:
        images = _open_files(_existing(name.removeprefix(PREFIX), name), classes)
        return PairsSource(
            items=images.items,
            class_names=images.class_names,
            skipped=images.skipped,
            notes=images.notes,
            state=images.state,
            defaults=FormDefaults(None, 3, False, condition_channels=3),
            images=images,
            conditions=None,
        )
    if found := _tars(name):
        if classes != "none":
            raise SourceError(f"source {name}: pairs in tar files have no classes; leave --classes out")
        return _tar_pairs(name, *found)
    given, wanted = _split(name)
    conditions, images = _open(given, "none"), _open(wanted, classes)
    by_stem = {_stem(item.name): item for item in conditions.items}
    if len(by_stem) < len(conditions.items):
        twice = next(stem for stem, count in Counter(_stem(x.name) for x in conditions.items).items() if count > 1)
        raise SourceError(f"source {name}: {conditions.description} has several files {twice}.*; keep one of them")
    items = [
        item._replace(num_bytes=item.num_bytes + by_stem[_stem(item.name)].num_bytes)
        for item in images.items
        if _stem(item.name) in by_stem
    ]
    skipped = (*_alone(images, by_stem, conditions), *_alone(conditions, {_stem(x.name) for x in items}, images))
    if 2 * len(items) < len(images.items):
        raise SourceError(
            f"source {name}: only {len(items)} of {len(images.items)} images have a partner; names that are equal with "
            f"their folders, up to the suffix, make a pair: {'; '.join(line.text for line in skipped)}"
        )
    suffixes = {stem: item.name.removeprefix(stem) for stem, item in by_stem.items()}
    ((suffix, _),) = Counter(suffixes.values()).most_common(1)
    return PairsSource(
        items=tuple(items),
        class_names=images.class_names,
        skipped=(*images.skipped, *conditions.skipped, *skipped),
        notes=images.notes,
        state=hashlib.sha256(f"{images.state} {conditions.state}".encode()).hexdigest(),
        defaults=FormDefaults(None, 3, False, condition_channels=3),
        images=images,
        conditions=conditions,
        suffix=suffix,
        other_suffixes={stem: other for stem, other in suffixes.items() if other != suffix},
    )


def _split(name: str) -> tuple[Path, Path]:
    """The two folders of pairs:CONDITIONS:IMAGES; their names may hold colons."""
    if "://" in name:
        raise SourceError(f"source {redact(name)}: is a URL, but pairs are read from local files; download them")
    parts = name.removeprefix(PREFIX).split(":")
    if len(parts) < 2 or not all(parts):
        raise SourceError(
            f"source {name}: expected is {PREFIX}CONDITIONS:IMAGES, two folders or zip files, "
            f"{PREFIX}TARS:SUFFIX:SUFFIX, the suffixes of both in tar files, or {PREFIX}FOLDER with --side-by-side"
        )
    ways = [(":".join(parts[:i]), ":".join(parts[i:])) for i in range(1, len(parts))]
    found = next((way for way in ways if all(exists(Path(filled(path, name))) for path in way)), ways[0])
    conditions, images = (_existing(path, name) for path in found)
    return conditions, images


class _Suffixes(NamedTuple):
    """Of members of a key, without the first dot."""

    condition: str
    image: str


class _Member(NamedTuple):
    name: str
    place: str
    """`OFFSET+SIZE` in its shard."""
    size: int


def _tars(name: str) -> tuple[Path, _Suffixes] | None:
    """Tar files and suffixes of pairs:TARS:SUFFIX:SUFFIX; None if it is something else."""
    path, *suffixes = name.removeprefix(PREFIX).rsplit(":", 2)
    if "://" in name or len(suffixes) < 2 or not path or not exists(place := Path(filled(path, name))):
        return None
    if place.is_dir() and not any(file.suffix.lower() == ".tar" for file in place.iterdir()):
        return None
    return place, _Suffixes(*(suffix.removeprefix(".").lower() for suffix in suffixes))


def _tar_pairs(name: str, path: Path, suffixes: _Suffixes) -> TarPairsSource:
    """List the pairs of tar files: the members `KEY.SUFFIX` of both suffixes, in archive order."""
    where = f"source {name}"
    if not all(suffixes) or len({*suffixes}) < 2:
        raise SourceError(
            f"{where}: its suffixes are {' and '.join(map(repr, suffixes))}; expected are two that differ, that of the "
            f"conditions first, such as {PREFIX}{path}:edges.png:jpg"
        )
    folder, shards = find_shards(path)
    items, alone, skips, others, state = list[Item](), list[str](), Skips(), Counter[str](), State()
    for shard in shards:
        members = _paired_members(folder / shard, suffixes, skips, others)
        for condition, image in members:
            if condition and image:
                place = f"{shard}@{image.place}@{condition.place}/{image.name}"
                items.append(Item(place, image.size + condition.size, None))
            elif lonely := condition or image:
                alone.append(lonely.name)
        state.add(folder / shard)
    both = f".{suffixes.condition} and .{suffixes.image}"
    if len(items) < len(alone) or not items:
        found = ", ".join(suffix for suffix, _ in others.most_common(_LISTED)) or "none"
        raise SourceError(
            f"{where}: only {len(items)} keys have both {both}, and {len(alone)} have one of them"
            + (f", such as {alone[0]}" if alone else "")
            + f"; other suffixes in its {len(shards)} tar files: {found}"
        )
    lines = (Skipped(len(alone), "", f"has no partner: not both {both}", alone[0]),) if alone else ()
    return TarPairsSource(
        items=tuple(items),
        skipped=(*skips.listed(), *lines),
        state=state.digest,
        defaults=FormDefaults(None, 3, False, condition_channels=3),
        description=f"{PREFIX}{path.resolve().name}:{':'.join(suffixes)}",
        folder=folder,
    )


def _paired_members(
    shard: Path, suffixes: _Suffixes, skips: Skips, others: Counter[str]
) -> list[tuple[_Member | None, _Member | None]]:
    """Condition and image of each key of a tar file."""
    found: dict[str, dict[str, _Member]] = {}
    for member in members_of(shard):
        file = PurePosixPath(member.name).name
        if member.isdir():
            continue
        # The longer one first: of edges.jpg and jpg, both fit a condition.
        fitting = [x for x in sorted(suffixes, key=len, reverse=True) if file.lower().endswith(f".{x}")]
        if file.startswith("."):
            skips.add(member.name, HIDDEN)
        elif not fitting:
            others[file[file.find(".") :].lower() if "." in file else "(none)"] += 1
            if PurePosixPath(file).suffix.lower() not in SIDECAR_SUFFIXES:
                skips.add(member.name, _OTHER)
        elif not member.isreg() or member.issparse():
            skips.add(member.name, LINK)
        else:
            of_key = found.setdefault(member.name[: -len(fitting[0]) - 1], {})
            if fitting[0] in of_key:  # tar -r and tar -u append a newer one
                skips.add(member.name, REPLACED)
            of_key[fitting[0]] = _Member(member.name, f"{member.offset_data}+{member.size}", member.size)
    return [(of_key.get(suffixes.condition), of_key.get(suffixes.image)) for of_key in found.values()]


def _existing(path: str, name: str) -> Path:
    """A folder or file that a source names."""
    place = Path(filled(path, name))
    if not path or not exists(place):
        raise SourceError(f"source {name}: no such file or folder {path!r}")
    return place


def _open(path: Path, classes: Classes) -> FolderSource | ZipSource:
    """A folder or a zip of images, or of .npy files without images."""
    try:
        return _open_files(path, classes)
    except SourceError as error:
        try:
            return _open_files(path, classes, reason_to_skip_no_array)
        except SourceError:
            raise error from None


def _open_files(path: Path, classes: Classes, to_skip: WhyToSkip = reason_to_skip) -> FolderSource | ZipSource:
    return (zip_source if path.is_file() else folder_source)(path, classes=classes, to_skip=to_skip)


def _alone(source: Source, partners: Container[str], other: Source) -> tuple[Skipped, ...]:
    """The files of a source without a partner, in one line."""
    names = [item.name for item in source.items if _stem(item.name) not in partners]
    if not names:
        return ()
    suffix = names[0][len(_stem(names[0])) :].lower()
    return (Skipped(len(names), suffix, f"{_LACKS} {other.description}", names[0]),)


def _stem(name: str) -> str:
    """A name without its suffix, with its folders."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]
