"""Terminal output of the commands."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data.storage.redaction import escaped


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints names and messages unchanged: no markup, colours or added line breaks.

    Characters outside the stream's encoding, and bytes of file names that are not text, are escaped.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False)


def bytes_bar(console: Console, *, transient: bool = False) -> Progress:
    """A progress bar of bytes with their rate; disabled unless the console is a terminal. A transient one vanishes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


def progress_bar(console: Console) -> Progress:
    """A progress bar with counts and remaining time; disabled unless the console is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def downloads(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Tells of downloads: a bar for each file, or a line for each where the console is no terminal.

    Yields:
        What is told the name of a file, the bytes of it that have arrived, and its size, 0 if that is unknown.
    """
    bars = bytes_bar(console, transient=True)
    tasks = {}

    def report(name: str, num_bytes: int, size: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(escaped(name), total=size or None)
            if console.is_terminal:
                bars.start()
            else:
                console.print(f"fetching {escaped(name)} ({size / 1e6:.1f} MB)")
        bars.update(tasks[name], completed=num_bytes)

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.stop()
