"""The work behind `python -m data.prepare`: encode in worker processes, write in a fixed order, publish at the end."""

import contextlib
import multiprocessing
import re
import signal
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.encode import ImageForm, Prepared, prepare_items
from data.shards import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    DataError,
    IndexDocument,
    ShardIndex,
    load_index,
    verify_present,
)
from data.sources import Item, Source

_CHUNK_ITEMS = 32
"""Images that a worker takes at once."""
_SHOWN_BAD = 50
_KEY_NAME_LENGTH = 60


class OutputError(ValueError):
    """The output folder cannot be used; the message says why and what to do."""


class PreparationError(RuntimeError):
    """The preparation failed on what it found in the source; the message says on what."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """One preparation, all defaults resolved."""

    form: ImageForm
    """What each image becomes."""
    shard_samples: int | None
    """Samples of a shard, None where shard_mb decides."""
    shard_mb: int | None
    """Size of a shard in 10^6 bytes, None where shard_samples decides."""
    seed: int
    """Decides on the order in which samples are put into shards."""
    max_bad_percent: float
    """Share of images that may be left out as unusable."""
    workers: int
    """Processes that encode; 0 encodes in the main process."""

    def recorded(self) -> dict[str, int | float | str | bool | None]:
        """What index.json keeps: the options that decide on the bytes."""
        return {
            "size": self.form.size,
            "channels": self.form.channels,
            "upscale": self.form.upscale,
            "shard_samples": self.shard_samples,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to do: a source, its fingerprint, how, and where."""

    source: Source
    """The images."""
    fingerprint: str
    """Stands for the list of images."""
    options: PrepareOptions
    """How they are prepared."""
    target: Path
    """Folder of the result."""


def find_prepared(job: Preparation) -> ShardIndex | None:
    """The index of this very data set, if it is there already; None if the target is free.

    Raises:
        OutputError: the target is something else, which is left alone.
    """
    target = job.target
    if not target.exists():
        return None
    advice = "choose another --out, or remove it yourself"
    if not target.is_dir():
        raise OutputError(f"--out {target} is a file; {advice}")
    if not any(target.iterdir()):
        if target.is_mount():
            raise OutputError(f"--out {target} is a mount point, which cannot be replaced; name a new folder inside it")
        return None
    if not (target / INDEX_NAME).is_file():
        raise OutputError(f"--out {target} holds other files; {advice}")
    try:
        index = load_index(target)
        differing = _differences(job, index)
        if differing:
            raise OutputError(f"--out {target} holds another prepared data set ({differing}); {advice}")
        verify_present(index)
    except DataError as error:
        raise OutputError(f"--out {target} holds a damaged data set: {error}") from None
    return index


def _differences(job: Preparation, index: ShardIndex) -> str:
    wanted: dict[str, object] = {"source": job.source.description, **job.options.recorded()}
    found: dict[str, object] = {"source": index.source, **index.options}
    names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if names:
        return ", ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in names)
    return "" if index.source_fingerprint == job.fingerprint else "the files of the source were not the same"


def prepare(job: Preparation, console: Console) -> tuple[ShardIndex, list[str]]:
    """Do it.

    Args:
        job: what to do; `find_prepared` has said that the target is free.
        console: where the progress bar goes.

    Returns:
        The index, and a line for each image that was left out.

    Raises:
        PreparationError: too many unusable images, or a worker died.
        OSError: the result could not be written. Nothing is left behind then, as with any other exception.
    """
    # Imported late: it brings torch, which neither a refusal nor a worker process should wait for.
    from data.writer import ShardSequence, new_folder, write_index

    source, options = job.source, job.options
    bad: list[str] = []
    max_bad = int(len(source.items) * options.max_bad_percent / 100)
    with new_folder(job.target) as folder:
        shard_bytes = None if options.shard_mb is None else options.shard_mb * 10**6
        with (
            ShardSequence(folder, shard_samples=options.shard_samples, shard_bytes=shard_bytes) as shards,
            _progress(console) as progress,
            # Closed here and not when the last traceback lets go of it: it holds the worker processes.
            contextlib.closing(_prepared_in_order(job)) as samples,
        ):
            task = progress.add_task("preparing", total=len(source.items))
            for number, prepared in samples:
                progress.advance(task)
                if prepared.error is None:
                    shards.write(_key(number, prepared.item), _members(prepared, options.form))
                    continue
                bad.append(f"{prepared.item.name} {prepared.error}")
                if len(bad) > max_bad:
                    raise PreparationError(
                        f"{len(bad)} of {len(source.items)} images are unusable, --max-bad {options.max_bad_percent:g} "
                        f"allows {max_bad}; mend or remove them, or allow more:\n" + "\n".join(shorten(bad))
                    )
        if not shards.shards:
            raise PreparationError("no usable image is left:\n" + "\n".join(shorten(bad)))
        names = source.class_names
        document = IndexDocument(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            image_size=options.form.size,
            image_channels=options.form.channels,
            num_classes=None if names is None else len(names),
            class_names=None if names is None else list(names),
            source=source.description,
            source_fingerprint=job.fingerprint,
            options=options.recorded(),
            shards=shards.shards,
        )
        write_index(folder, document)
    return load_index(job.target), bad


def shorten(lines: list[str]) -> list[str]:
    """A list of files, indented, no longer than fits a screen or two."""
    rest = [f"  and {len(lines) - _SHOWN_BAD} more"] if len(lines) > _SHOWN_BAD else []
    return [f"  {line}" for line in lines[:_SHOWN_BAD]] + rest


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _key(number: int, item: Item) -> str:
    """Unique by its number within the source; the end of the name is for the reader of an error message."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rpartition(".")[0] or item.name)[-_KEY_NAME_LENGTH:]
    return f"{number:09d}-{readable}"


def _members(prepared: Prepared, form: ImageForm) -> dict[str, bytes]:
    members = {form.extension: prepared.content}
    if prepared.item.label is not None:
        members["cls"] = str(prepared.item.label).encode()
    return members


def _prepared_in_order(job: Preparation) -> Generator[tuple[int, Prepared], None, None]:
    """The prepared images with their numbers in the source, in the shuffled order, whichever worker made them."""
    source, options = job.source, job.options
    draws = np.random.Philox(key=np.array([options.seed, 0], dtype=np.uint64)).random_raw(len(source.items))
    order = np.argsort(np.asarray(draws), kind="stable").tolist()
    chunks = [order[start : start + _CHUNK_ITEMS] for start in range(0, len(order), _CHUNK_ITEMS)]
    if options.workers == 0:
        for chunk in chunks:
            yield from zip(chunk, prepare_items(source, [source.items[n] for n in chunk], options.form), strict=True)
        return
    # Not fork: the progress bar runs a thread. Not spawn: the server imports the libraries once for all.
    executor = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(partial(prepare_items, source, form=options.form),),
    )
    waiting: deque[tuple[list[int], Future[list[Prepared]]]] = deque()
    # Ctrl-C is for the main process. Workers start with the first task and keep the mask that they start with.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for chunk in chunks:
            waiting.append((chunk, executor.submit(_work, [source.items[n] for n in chunk])))
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            if len(waiting) > 4 * options.workers:
                numbers, future = waiting.popleft()
                yield from zip(numbers, future.result(), strict=True)
        for numbers, future in waiting:
            yield from zip(numbers, future.result(), strict=True)
    except BrokenProcessPool:
        raise PreparationError(
            "a worker process was killed, most likely for want of memory; run again with fewer --workers"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        executor.shutdown(cancel_futures=True)


_prepare_items: Callable[..., list[Prepared]] | None = None
"""Set once in each worker process, so that a task carries no more than its items."""


def _start_worker(prepare_some: Callable[..., list[Prepared]]) -> None:
    global _prepare_items
    _prepare_items = prepare_some


def _work(items: list[Item]) -> list[Prepared]:
    assert _prepare_items is not None
    return _prepare_items(items)
