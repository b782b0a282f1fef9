"""`python -m data.prepare verify DIR`: hash every file, decode every image, and report all faults."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from data.processes.pool import map_in_order
from data.sets.terminal import progress_bar
from data.shards.decode import decode_into
from data.shards.files import ShardFiles, shard_files
from data.shards.index import Shard, ShardIndex
from data.shards.offsets import Table, read_offsets, scan
from data.shards.reader import EncodedSample, ShardReader, key_hash
from data.storage.files import sha256_of
from data.storage.location import DataError
from data.storage.redaction import escaped

_CACHE_GB = 50.0


class _Findings(NamedTuple):
    """Faults and keys of one shard."""

    shard_faults: list[str]
    sample_faults: list[str]
    key_hashes: npt.NDArray[np.uint64]
    """One per sample: the keys themselves would take hundreds of megabytes."""


def audit(index: ShardIndex, workers: int, out: Console, err: Console) -> bool:
    """Check everything; print a line for each fault and a summary.

    Args:
        index: the data set.
        workers: processes that decode; 0: this process decodes.
        out: prints the lines.
        err: shows the progress bar.

    Returns:
        Whether there is no fault.

    Raises:
        WorkerError: a worker process was killed.
    """
    bad_shards = bad_samples = 0
    hashes: list[npt.NDArray[np.uint64]] = []
    with (
        progress_bar(err) as progress,
        contextlib.closing(
            map_in_order(partial(_check_shard, index), range(len(index.shards)), min(workers, len(index.shards)))
        ) as results,
    ):
        task = progress.add_task("verifying", total=index.num_samples)
        for shard, findings in zip(index.shards, results, strict=True):
            for line in (*findings.shard_faults, *findings.sample_faults):
                out.print(escaped(line))
            bad_shards += bool(findings.shard_faults)
            bad_samples += len(findings.sample_faults)
            hashes.append(findings.key_hashes)
            progress.advance(task, shard.num_samples)
    for line in _repeated_keys(index, hashes):
        out.print(escaped(line))
        bad_samples += 1
    summary = f"{index.shown_location}: {index.num_samples} images in {len(index.shards)} shards"
    if not (bad_shards or bad_samples):
        out.print(f"{summary}: all is well")
        return True
    out.print(
        f"{summary}: bad shards: {bad_shards}, bad images: {bad_samples}; prepare the data set again or copy it again"
    )
    return False


def _check_shard(index: ShardIndex, number: int) -> _Findings:
    shard = index.shards[number]
    findings = _Findings([], [], np.zeros(0, dtype=np.uint64))
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(
                contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB))
            )
            descriptor = files.open(shard)
            stack.callback(os.close, descriptor)
            findings.shard_faults.extend(_wrong_hash(descriptor, shard))
            # From the shard itself: the offsets are checked too.
            table = scan(descriptor, shard)
            findings.shard_faults.extend(_wrong_offsets(files, shard, table))
            reader = stack.enter_context(contextlib.closing(ShardReader(files.open, shard, table)))
        except DataError as error:
            findings.shard_faults.append(str(error))
            return findings
        hashes = np.zeros(shard.num_samples, dtype=np.uint64)
        pixels = np.empty(index.pixels_shape, dtype=np.uint8)
        for place in range(shard.num_samples):
            try:
                sample = reader.read(place)
                hashes[place] = key_hash(sample.key)
                decode_into(pixels, sample)
                _check_label(index, sample)
            except DataError as error:
                findings.sample_faults.append(str(error))
    return findings._replace(key_hashes=hashes)


def _wrong_hash(descriptor: int, shard: Shard) -> Iterator[str]:
    try:
        found = sha256_of(descriptor)
    except OSError as error:
        yield f"shard {shard.name}: cannot be read: {error.strerror}"
        return
    if found != shard.sha256:
        yield f"shard {shard.name}: its SHA-256 is {found}, the index says {shard.sha256}"


def _wrong_offsets(files: ShardFiles, shard: Shard, table: Table) -> Iterator[str]:
    if shard.offsets is None:
        return
    try:
        found = read_offsets(shard, files.open)
    except DataError as error:
        yield str(error)
        return
    if not np.array_equal(found, table):
        sample = int(np.flatnonzero((found != table).any(axis=1))[0])
        yield f"{shard.offsets.title}: the shard has sample {sample} in another place, or with another size or label"


def _check_label(index: ShardIndex, sample: EncodedSample) -> None:
    where = f"shard {sample.shard}, key {sample.key}"
    if index.num_classes is None and sample.label is not None:
        raise DataError(f"{where}: it has the label {sample.label}, the index has no classes")
    if index.num_classes is not None and sample.label is None:
        raise DataError(f"{where}: it has no label, the index has {index.num_classes} classes")
    if index.num_classes is not None and sample.label is not None and sample.label >= index.num_classes:
        raise DataError(f"{where}: its label is {sample.label}, the index allows 0 to {index.num_classes - 1}")


def _repeated_keys(index: ShardIndex, hashes: list[npt.NDArray[np.uint64]]) -> Iterator[str]:
    """A line for each sample that repeats an earlier key."""
    ordered, counts = np.unique(np.concatenate(hashes), return_counts=True)
    # 0 marks an unreadable sample.
    repeated = ordered[(counts > 1) & (ordered != 0)]
    if not repeated.size:
        return
    first_shard: dict[str, str] = {}
    for shard, shard_hashes in zip(index.shards, hashes, strict=True):
        places = np.flatnonzero(np.isin(shard_hashes, repeated)).tolist()
        if not places:
            continue
        with (
            contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB)) as files,
            contextlib.closing(ShardReader(files.open, shard)) as reader,
        ):
            # Equal hashes are only a hint.
            for key in (reader.read(place).key for place in places):
                if key in first_shard:
                    yield f"shard {shard.name}, key {key}: the key is not unique, shard {first_shard[key]} has it too"
                first_shard.setdefault(key, shard.name)
