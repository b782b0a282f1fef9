"""One measurement in a process of its own: if it runs out of memory, crashes or hangs, the others are not lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.storage.redaction import redact
from data.storage.surroundings import processor

MAX_WORDS = 160
"""Longest reason shown, in characters."""
_GRACE_S = 5.0
"""Between SIGTERM, after which torchrun ends its ranks, and SIGKILL."""
_NO_MEMORY = re.compile(
    r"out ?of ?memory|can(no|')t allocate memory|bad_alloc|ALLOC_FAILED|MemoryError|SIGKILL", re.IGNORECASE
)
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class Outcome:
    """How a measurement ended.

    Attributes:
        report: the JSON object that it printed; None if it failed.
        failure: why it failed, in one line; empty if it did not.
        seconds: its duration, with the start of the process.
        out_of_memory: whether it needed more memory than there is.
    """

    report: dict[str, Any] | None
    failure: str
    seconds: float
    out_of_memory: bool = False


def run_trial(arguments: Sequence[str], limit_s: float, log: Path, *, ranks: int = 1) -> Outcome:
    """Run `python -m ARGUMENTS`, which prints a JSON object, until it ends or the time is over.

    Args:
        arguments: the module and its arguments.
        limit_s: after this many seconds the process and its children are killed.
        log: file for what it writes to stderr.
        ranks: number of ranks; more than one are started by torchrun.
    """
    group = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return read_outcome(run_process([*group, *arguments], limit_s, log), log.read_text(errors="replace"))


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; None if it was killed because its time was over.
        printed: what it wrote to stdout.
        seconds: its duration.
    """

    code: int | None
    printed: str
    seconds: float


def run_process(arguments: Sequence[str], limit_s: float, log: Path) -> Ended:
    """Run `python -m ARGUMENTS` until it ends or `limit_s` seconds are over; its stderr goes to the file `log`."""
    began = time.perf_counter()
    with log.open("wb") as written:
        # A group of its own, so that Ctrl-C reaches only this process, and all of the group can be ended.
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            process_group=0,
        )
        try:
            printed, _ = process.communicate(timeout=limit_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            printed, code = "", None
        finally:
            _end(process)
    return Ended(code, printed, time.perf_counter() - began)


def read_outcome(ended: Ended, log: str) -> Outcome:
    """The outcome of a process that prints a JSON object; `log` is what it wrote to stderr."""
    code, seconds = ended.code, ended.seconds
    if code is None:
        return Outcome(None, f"no result in {seconds:.0f} s", seconds)
    if code == 0:
        with suppress(ValueError):
            report = json.loads(ended.printed[ended.printed.index("{") :])
            return Outcome(report, "", seconds)
    if code == -signal.SIGKILL or _NO_MEMORY.search(log):
        return Outcome(None, "out of memory", seconds, out_of_memory=True)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    words = redact((errors or lines or [f"exit code {code}, and no message"])[-1])
    if code < 0:
        words = f"ended by {signal.Signals(-code).name}: {words}"
    return Outcome(None, words if len(words) <= MAX_WORDS else f"{words[: MAX_WORDS - 3]}...", seconds)


def _end(process: "subprocess.Popen[str]") -> None:
    """End what is left of a process and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    if process.stdout:
        process.stdout.close()


def set_words(settings: Sequence[str]) -> list[str]:
    """Overrides as arguments: `--set` before each."""
    return [word for setting in settings for word in ("--set", setting)]


def for_this_machine(overrides: Sequence[str]) -> list[str]:
    """The user's overrides; on a machine without a GPU the CPU is measured, unless the user chose."""
    return [*([] if torch.cuda.is_available() else ["scaling.device=cpu"]), *overrides]


def hardware(device: str) -> str:
    """The device that is measured, in words.

    Args:
        device: scaling.device.
    """
    what = torch.cuda.get_device_name() if device == "gpu" else processor()
    return f"{what}, torch {torch.__version__}"
