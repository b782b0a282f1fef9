"""Turn images into a prepared data set: `python -m data.prepare SOURCE --out DIR`. Further commands are in data/sets.

The same source and options give the same bytes, for any number of workers and of restarts. The result appears as a
whole or not at all. If it exists already, the same command does nothing.
"""

import argparse
import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from data.prepare.arguments import parse_arguments, resolve_options
from data.prepare.job import Preparation, refuse_unwritable_names
from data.prepare.places import UrlPlace
from data.prepare.work import Outcome, PreparationError, prepare, prepare_at_url, shorten
from data.sets.command import run as run_set_command
from data.sets.terminal import downloads, plain_console
from data.sets.work_folder import OutputError
from data.shards.files import shard_files
from data.shards.index import ShardIndex
from data.shards.offsets import read_offsets
from data.sources.find import open_source
from data.sources.source import fingerprint, shown_name
from data.storage.errors import as_command
from data.storage.location import is_remote, is_url
from data.storage.redaction import redact
from data.storage.writable import StorageError

_SHOWN_CLASSES = 20
_CACHE_GB = 50.0


@as_command(name="data.prepare", interrupted="interrupted; run the same command again")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    out, err = plain_console(), plain_console(stderr=True)

    with _signals_interrupt():
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        try:
            if arguments.command == "prepare":
                return _prepare(arguments, out, err)
            return run_set_command(arguments, out, err)
        except MemoryError:
            raise PreparationError("too little memory; run again with fewer --workers or a smaller --size") from None
        except OSError as error:
            raise PreparationError(f"{error.filename or 'input/output'}: {error.strerror or error}") from None


def _prepare(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    with downloads(err) as report:
        source = open_source(
            arguments.source,
            split=arguments.split,
            max_images=arguments.max_images,
            skip_images=arguments.skip_images or 0,
            seed=arguments.seed,
            classes=arguments.classes,
            condition_half=arguments.side_by_side,
            column=arguments.column,
            label=arguments.label,
            subset=arguments.subset,
            report=report,
        )
    refuse_unwritable_names(source)
    job = Preparation(
        source=source,
        fingerprint=fingerprint(source),
        options=resolve_options(arguments, source),
        target=Path() if arguments.ray and is_remote(arguments.out) else _target(arguments.out),
    )
    try:
        outcome = _prepare_on_ray(job, arguments.out, err) if arguments.ray else prepare(job, err)
    except StorageError as error:
        raise PreparationError(f"{error}; the same command continues") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PreparationError(
                "the disk of --out is full; nothing is left behind: free some space or choose another disk"
            ) from None
        where = error.filename or "input/output"
        raise PreparationError(f"{where}: {error.strerror or error}; nothing is left behind") from None
    index = outcome.index
    if outcome.was_there:
        out.print(f"{index.shown_location} already holds this data set ({index.num_samples} images); nothing to do")
        return 0
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    given = ""
    if channels := index.condition_channels:
        given = f", each with a condition of {channels} channel{'s' * (channels > 1)}"
    form = f"{index.image_size}x{index.image_size}x{index.image_channels}{given}"
    out.print(
        f"{index.shown_location}: {index.num_samples} images {form}, {len(index.shards)} shards, {num_bytes} bytes"
    )
    if source.skipped:
        lines = shorten([line.text for line in source.skipped])
        out.print("\n".join([f"files of {shown_name(source.description)} that were left out:", *lines]))
    if outcome.removed:
        out.print("\n".join(["images that were filtered out:", *(f"  {line.text}" for line in outcome.removed)]))
    if outcome.bad:
        out.print("\n".join([f"{len(outcome.bad)} unusable images were left out:", *shorten(outcome.bad)]))
    for note in source.notes:
        out.print(note)
    out.print(_class_line(index))
    return 0


def _prepare_on_ray(job: Preparation, out: str, err: Console) -> Outcome:
    # Imported here: Ray reads the environment at its import, which takes seconds.
    from data.prepare.on_ray import connected

    # Ray sets handlers of its own.
    with connected() as way, _signals_interrupt():
        return prepare_at_url(job, UrlPlace(out), err, way=way) if is_remote(out) else prepare(job, err, way=way)


def _class_line(index: ShardIndex) -> str:
    """Names and sizes of the classes; names of those without images."""
    names = index.class_names
    if names is None:
        return "no classes"
    counts = np.zeros(len(names), dtype=np.int64)
    with contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB)) as files:
        for shard in index.shards:
            labels = read_offsets(shard, files.open)[:, 2].astype(np.int64) - 1
            counts += np.bincount(labels, minlength=len(names))
    empty = [shown_name(name) for name, count in zip(names, counts, strict=True) if not count]
    lost = f"; without images: {_first(empty)}" if empty else ""
    sizes = [f"{shown_name(name)} {count}" for name, count in zip(names, counts, strict=True) if count]
    return f"{len(names)} classes: {_first(sizes)}{lost}"


def _first(texts: list[str]) -> str:
    rest = f" and {len(texts) - _SHOWN_CLASSES} more" if len(texts) > _SHOWN_CLASSES else ""
    return ", ".join(texts[:_SHOWN_CLASSES]) + rest


def _target(out: str) -> Path:
    if is_url(out):
        raise OutputError(
            f"--out {redact(out)} is a URL, but data sets are prepared on a local disk; name a folder here and push "
            "it when it is finished, or add --ray"
        )
    try:
        return Path(out).resolve()
    except RuntimeError:
        raise OutputError(f"--out {out} is a circle of links; remove it, or choose another --out") from None


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and a closed terminal clean up like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)}
    for which, handler in previous.items():
        # nohup ignores SIGHUP.
        if handler != signal.SIG_IGN:
            signal.signal(which, signal.default_int_handler)
    try:
        yield
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
