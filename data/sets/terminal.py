"""Terminal output of the commands."""

import io
import sys

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


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints names and messages unchanged: no markup, colours or added line breaks.

    Characters outside the stream's encoding, and bytes of file names that are not text, are escaped.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False)


def bytes_bar(console: Console) -> Progress:
    """A progress bar of bytes with their rate; disabled unless the console is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
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
