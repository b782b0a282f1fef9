"""A terminal sees a bar with counts; a file or a pipe sees none of it."""

import os
import pty
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from data.sets.terminal import downloads, plain_console, progress_bar
from tests.launch import ROOT


def shown_on_a_terminal(*arguments: str) -> str:
    """What a command writes to stderr when that is a terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *arguments],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=its,
    )
    os.close(its)
    shown = b""
    # A terminal whose other end is closed gives an error rather than an end of the file.
    while part := _read(ours):
        shown += part
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 0
    return shown.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


@pytest.mark.slow
def test_preparing_and_verifying_count_on_a_terminal(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    prepared = shown_on_a_terminal("digits", "--out", out, "--shard-samples", "300", "--workers", "2")
    assert "preparing" in prepared
    assert "1797/1797" in prepared
    verified = shown_on_a_terminal("verify", out, "--workers", "2")
    assert "verifying" in verified
    assert "1797/1797" in verified


def test_no_bar_goes_to_what_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(plain_console(stderr=True)) as progress:
        progress.advance(progress.add_task("preparing", total=2))
    assert capsys.readouterr() == ("", "")


def test_downloads_are_bars_on_a_terminal_and_lines_elsewhere() -> None:
    shown = {}
    for is_terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=is_terminal, width=100)
        with downloads(console) as report:
            for num_bytes in (0, 10**6, 3 * 10**6):
                report("a.zip", num_bytes, 3 * 10**6)
            report("unknown", 5, 0)
        assert isinstance(console.file, StringIO)
        shown[is_terminal] = console.file.getvalue()
    assert "a.zip" in shown[True] and "3.0/3.0 MB" in shown[True]
    assert shown[False] == "fetching a.zip (3.0 MB)\nfetching unknown (0.0 MB)\n"
    console = Console(file=StringIO(), force_terminal=True)
    with downloads(console):
        pass
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""
