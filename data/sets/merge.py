"""`python -m data.prepare merge DIR DIR --out DIR`: joins prepared data sets of one form.

Shards are linked, or copied where the disk does not allow that, under new names. A shard is written anew only if a
label or a key in it changes; its images keep their bytes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from data.sets.origin import Origin, load_origin
from data.sets.terminal import progress_bar
from data.sets.work_folder import OutputError, WorkFolder, remove_emptied
from data.shards.files import LocalShards
from data.shards.index import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    IndexDocument,
    Shard,
    ShardIndex,
    load_index,
    verify_present,
)
from data.shards.offsets import LABEL_EXTENSION
from data.shards.reader import ShardReader, key_hash
from data.shards.verification import is_intact
from data.shards.writer import ShardSequence, write_index, write_offsets
from data.storage.errors import OperationError
from data.storage.location import DataError, is_remote
from data.storage.redaction import redact


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The result of a merge."""

    index: ShardIndex
    """The new data set."""
    num_rewritten: int = 0
    """Shards that were written anew."""
    was_there: bool = False
    """It was merged already."""


def merge(directories: Sequence[str], out: str, console: Console) -> Merged:
    """Join prepared data sets in the given order.

    Args:
        directories: folders of two or more data sets of one form, which stay as they are.
        out: new or empty folder.
        console: shows the progress bar.

    Raises:
        DataError: one is missing or damaged, or they differ in their form.
        OutputError: `out` holds something else.
        OperationError: a shard is damaged.
        OSError: the result could not be written; nothing is left behind.
    """
    if len(directories) < 2:
        raise OutputError("only one data set is given: name two or more")
    if remote := next((place for place in (*directories, out) if is_remote(place)), None):
        raise OutputError(f"{redact(remote)} is a URL: data sets are merged on a local disk; pull it first")
    indexes = [load_index(directory) for directory in directories]
    _refuse_other_forms(indexes)
    for index in indexes:
        verify_present(index)
    target = Path(out).resolve()
    document = _document(indexes)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        return _find_merged(target, document)
    with WorkFolder(target) as work:
        try:
            work.journal.unlink(missing_ok=True)
            work.discard()
            shards, num_rewritten = _join(indexes, _labels_of(indexes, document), work.result, console)
            _write_origin(indexes, work.result)
            write_index(work.result, replace(document, shards=shards))
            work.publish()
        except BaseException:
            work.remove()
            raise
    remove_emptied(target)
    return Merged(index=load_index(target), num_rewritten=num_rewritten)


def _write_origin(indexes: Sequence[ShardIndex], folder: Path) -> None:
    """Keep the sizes of the originals, if all data sets have them."""
    origins = [load_origin(index.directory) for index in indexes]
    if all(origin is not None and origin.sides for origin in origins):
        sides = sum((Counter(origin.sides) for origin in origins if origin is not None), Counter[str]())
        ordered = {side: sides[side] for side in sorted(sides, key=int)}
        Origin(state="merged", content="merged", sides=ordered).save(folder)


def _refuse_other_forms(indexes: Sequence[ShardIndex]) -> None:
    """Refuse data sets that no training could read as one."""
    first = indexes[0]
    for other in indexes[1:]:
        for name, one, another in (
            ("image size", first.image_size, other.image_size),
            ("channels", first.image_channels, other.image_channels),
            ("condition channels", first.condition_channels, other.condition_channels),
            ("classes", _has_classes(first), _has_classes(other)),
        ):
            if one != another:
                raise DataError(
                    f"{first.location} and {other.location} have not one form: {name} {one} and {another}; prepare one "
                    "of them again in the form of the other"
                )
    digests = [index.digest for index in indexes]
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            twin = indexes[digests.index(digest)]
            raise DataError(f"{twin.location} and {indexes[i].location} are the same data set; name each once")


def _has_classes(index: ShardIndex) -> str:
    return "none" if index.class_names is None else "some"


def _names(index: ShardIndex) -> list[str]:
    """The class names as they are written; those of a `ShardIndex` are safe to print."""
    names: list[str] = json.loads((index.directory / INDEX_NAME).read_bytes())["class_names"]
    return names


def _document(indexes: Sequence[ShardIndex]) -> IndexDocument:
    """The index of the result, without its shards."""
    first = indexes[0]
    names = None if first.class_names is None else list(dict.fromkeys(name for x in indexes for name in _names(x)))
    options: dict[str, Any] = {
        name: value for name, value in first.options.items() if all(x.options.get(name) == value for x in indexes)
    }
    digests = " ".join(index.digest for index in indexes)
    return IndexDocument(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        image_size=first.image_size,
        image_channels=first.image_channels,
        num_classes=None if names is None else len(names),
        class_names=names,
        source="merge:" + "+".join(index.source for index in indexes),
        source_fingerprint=hashlib.sha256(digests.encode()).hexdigest(),
        options={**options, "merged": digests},
        shards=[],
        condition_channels=first.condition_channels or None,
    )


def _labels_of(indexes: Sequence[ShardIndex], document: IndexDocument) -> list[dict[int, int]]:
    """For each data set, the new label of each of its labels."""
    if document.class_names is None:
        return [{} for _ in indexes]
    numbers = {name: number for number, name in enumerate(document.class_names)}
    return [{label: numbers[name] for label, name in enumerate(_names(index))} for index in indexes]


def _find_merged(target: Path, document: IndexDocument) -> Merged:
    advice = "choose another --out, or remove it yourself"
    if not (target / INDEX_NAME).is_file():
        raise OutputError(f"--out {target} holds other files; {advice}")
    index = load_index(target)
    if index.source_fingerprint != document.source_fingerprint or index.options != document.options:
        raise OutputError(f"--out {target} holds another prepared data set; {advice}")
    verify_present(index)
    return Merged(index=index, was_there=True)


def _join(
    indexes: Sequence[ShardIndex], labels: Sequence[dict[int, int]], folder: Path, console: Console
) -> tuple[list[Shard], int]:
    """Put the shards of all data sets into a folder; return them, and how many were written anew."""
    shards: list[Shard] = []
    num_rewritten = 0
    taken = np.zeros(0, dtype=np.uint64)
    with progress_bar(console) as progress:
        task = progress.add_task("merging", total=2 * sum(len(index.shards) for index in indexes))
        for number, (index, new_labels) in enumerate(zip(indexes, labels, strict=True), start=1):
            moves = any(old != new for old, new in new_labels.items())
            hashes: list[npt.NDArray[np.uint64]] = []
            for shard in index.shards:
                hashes.append(_checked_keys(index, shard))
                progress.advance(task)
            # Keys that may not be given to others: those of the sets before, and of this one.
            own = np.unique(np.concatenate([taken, *hashes]))
            for shard, of_shard in zip(index.shards, hashes, strict=True):
                clashes = _are_in(of_shard, taken)
                if moves or clashes.any():
                    shards.append(_rewritten(index, shard, new_labels, clashes, number, own, shards, folder))
                    num_rewritten += 1
                else:
                    shards.append(_linked(index.directory, shard, folder, f"{len(shards):05d}.tar"))
                progress.advance(task)
            taken = own
    return shards, num_rewritten


def _checked_keys(index: ShardIndex, shard: Shard) -> npt.NDArray[np.uint64]:
    """The hash of each key of a shard, whose own hash is checked."""
    if not is_intact(index.directory, shard):
        raise OperationError(
            f"{index.location}: shard {shard.name} was altered; copy it again, or prepare the data set again"
        )
    with contextlib.closing(ShardReader(LocalShards(index).open, shard)) as reader:
        return np.fromiter(map(key_hash, reader.keys()), dtype=np.uint64, count=shard.num_samples)


def _are_in(hashes: npt.NDArray[np.uint64], ordered: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which hashes are among others, which are in ascending order."""
    if not ordered.size:
        return np.zeros(len(hashes), dtype=np.bool_)
    return ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)] == hashes


def _free_key(key: str, number: int, taken: npt.NDArray[np.uint64]) -> str:
    """A key that an earlier data set has, with the number of its own data set behind it, until it is free."""
    while _are_in(np.array([key_hash(key)], dtype=np.uint64), taken).any():
        key = f"{key}-{number}"
    return key


def _rewritten(
    index: ShardIndex,
    shard: Shard,
    labels: dict[int, int],
    clashes: npt.NDArray[np.bool_],
    number: int,
    taken: npt.NDArray[np.uint64],
    shards: Sequence[Shard],
    folder: Path,
) -> Shard:
    """Write the samples of a shard with other labels, and with other keys where they clash."""
    with (
        contextlib.closing(ShardReader(LocalShards(index).open, shard)) as reader,
        ShardSequence(folder, shard_samples=None, shard_bytes=None, finished=shards) as sequence,
    ):
        for place, clash in enumerate(clashes.tolist()):
            sample = reader.read(place)
            members = {sample.extension: sample.content}
            if sample.label is not None:
                if sample.label not in labels:
                    where = f"{index.location}: shard {shard.name}, key {sample.key}"
                    raise OperationError(f"{where}: its label {sample.label} is of no class; prepare the set again")
                members[LABEL_EXTENSION] = str(labels[sample.label]).encode()
            sequence.write(_free_key(sample.key, number, taken) if clash else sample.key, members)
        new = sequence.finish()
    assert new is not None
    return new


def _linked(source: Path, shard: Shard, folder: Path, name: str) -> Shard:
    """Link or copy a shard and its offsets."""
    named = replace(shard, name=name, offsets=None)
    _link_or_copy(source / shard.name, folder, named)
    # Data sets of version 1 have no offsets.
    return replace(named, offsets=write_offsets(folder, named))


def _link_or_copy(source: Path, folder: Path, shard: Shard) -> None:
    try:
        os.link(source.resolve(), folder / shard.name)
    except OSError:
        # Another disk, a file system without links, or a file of another user.
        shutil.copyfile(source, folder / shard.name)
        if not is_intact(folder, shard):
            raise OperationError(f"{folder / shard.name} is not what was copied from {source}") from None
