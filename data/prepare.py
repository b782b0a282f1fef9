"""Turn images into a prepared data set: `python -m data.prepare SOURCE --out DIR`.

The same source and options give the same bytes, whatever the number of workers. The result appears as a whole or not at
all, and the same command again finds it and does nothing.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn, cast

from rich.console import Console

from data.encode import ImageForm
from data.preparation import (
    OutputError,
    Preparation,
    PreparationError,
    PrepareOptions,
    find_prepared,
    prepare,
    shorten,
)
from data.sources import Source, SourceError, fingerprint, open_source

_MIN_SIZE = 4
_DIGITS_SIZE = 16
_DEFAULT_SHARD_SAMPLES = 4096

_EPILOG = """sources:
  digits      1,797 handwritten digits of scikit-learn, 8x8 grey, enlarged to 16x16 unless --size says otherwise
              (a folder of that name is ./digits)
  a folder    of images; its sub-folders, if any, are the classes
  a .zip      of images, in the same form

exit codes: 0 done or already there, 1 failed (bad images, full disk), 2 wrong arguments, 130 interrupted"""


class UsageError(ValueError):
    """A mistake in the arguments; the message says what, where, what is allowed and what to do."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m data.prepare --help")


def _whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        if not re.fullmatch(r"-?\d{1,20}", text) or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a whole number of {allowed}")
        return int(text)

    return parse


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a percentage of 0 to 100")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m data.prepare",
        description="Turn images into tar shards and an index for training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="digits, a folder of images, or a .zip file")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the prepared data set")
    parser.add_argument("--size", type=_whole_number(_MIN_SIZE), help="height and width in pixels, 4 or more")
    parser.add_argument(
        "--channels", type=_whole_number(1), choices=(1, 3), help="1 grey or 3 RGB (default: 3, for digits 1)"
    )
    parser.add_argument("--upscale", action="store_true", help="enlarge images that are smaller than --size")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--shard-samples", type=_whole_number(1), metavar="N", help=f"images of a shard ({_DEFAULT_SHARD_SAMPLES})"
    )
    shards.add_argument("--shard-mb", type=_whole_number(1), metavar="N", help="or: its size in 10^6 bytes")
    parser.add_argument(
        "--workers", type=_whole_number(0), metavar="N", help="processes that encode (default: by CPUs and images)"
    )
    parser.add_argument(
        "--seed", type=_whole_number(0, 2**64 - 1), default=0, help="decides on the order of the samples"
    )
    parser.add_argument(
        "--max-bad", type=_percent, default=1.0, metavar="PERCENT", help="unusable images to leave out at most (1)"
    )
    return parser


def resolve_options(arguments: argparse.Namespace, source: Source) -> PrepareOptions:
    """Fill in what depends on the source."""
    is_digits = source.description == "digits"
    size: int | None = arguments.size
    if size is None and not is_digits:
        raise UsageError(
            f"--size is missing: {source.description} has no default; give one of {_MIN_SIZE} or more, e.g. 64"
        )
    workers: int | None = arguments.workers
    if workers is None:
        # A process takes about as long to start as a few hundred images take.
        workers = min(len(os.sched_getaffinity(0)), len(source.items) // 500)
    by_size: int | None = arguments.shard_mb
    return PrepareOptions(
        form=ImageForm(
            size=size or _DIGITS_SIZE,
            channels=cast(Literal[1, 3], arguments.channels or (1 if is_digits else 3)),
            upscale=is_digits or arguments.upscale,
        ),
        shard_samples=None if by_size else arguments.shard_samples or _DEFAULT_SHARD_SAMPLES,
        shard_mb=by_size,
        seed=arguments.seed,
        max_bad_percent=arguments.max_bad,
        workers=0 if workers <= 1 and arguments.workers is None else workers,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    out, err = Console(soft_wrap=True, markup=False, highlight=False), Console(stderr=True, soft_wrap=True)

    def fail(message: str, code: int) -> int:
        err.print(f"data.prepare: {message}", markup=False, highlight=False)
        return code

    try:
        with _sigterm_interrupts():
            out.print(_run(arguments, err))
            return 0
    except (UsageError, SourceError, OutputError) as error:
        return fail(str(error), 2)
    except PreparationError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing is left behind, run the same command again", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail("the disk of --out is full; nothing is left behind: free some space or choose another disk", 1)
        return fail(f"{error.filename or 'input/output'}: {error.strerror or error}; nothing is left behind", 1)


def _run(argv: Sequence[str] | None, err: Console) -> str:
    arguments = _parser().parse_args(argv)
    source = open_source(arguments.source)
    options = resolve_options(arguments, source)
    job = Preparation(
        source=source, fingerprint=fingerprint(source), options=options, target=Path(arguments.out).resolve()
    )
    present = find_prepared(job)
    if present is not None:
        return f"{job.target} already holds this data set ({present.num_samples} images); nothing to do"
    index, bad = prepare(job, err)
    classes = f", {index.num_classes} classes" if index.num_classes else ""
    lines = [
        f"{job.target}: {index.num_samples} images {index.image_size}x{index.image_size}x{index.image_channels}"
        f"{classes}, {len(index.shards)} shards, {sum(shard.num_bytes for shard in index.shards)} bytes"
    ]
    if source.num_skipped:
        lines.append(f"{source.num_skipped} files of {source.description} are no images by their name and were skipped")
    if bad:
        lines += [f"{len(bad)} unusable images were left out:", *shorten(bad)]
    return "\n".join(lines)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let a polite kill clean up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
