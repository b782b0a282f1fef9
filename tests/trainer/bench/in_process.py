"""Measurements in this process instead of one of their own, which takes seconds to start."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from trainer import worker
from trainer.bench import command, gpu, trial
from trainer.bench.trial import Ended
from trainer.evaluate import command as evaluate

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "trainer.bench": command.main,
    "trainer.evaluate": evaluate.main,
    "trainer.worker": worker.main,
}


class InProcess:
    """Runs commands in this process, and keeps them.

    Attributes:
        commands: the arguments of each.
        fails: returns what a command ends with instead of running; None to run it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.fails: Callable[[list[str]], Ended | None] = lambda arguments: None
        for module in (trial, gpu):
            monkeypatch.setattr(module, "run_process", self)

    def __call__(self, arguments: Sequence[str], limit_s: float, log: Path) -> Ended:
        self.commands.append(list(arguments))
        log.write_text("")
        if ended := self.fails(self.commands[-1]):
            return ended
        with redirect_stdout(io.StringIO()) as printed, log.open("w") as errors, redirect_stderr(errors):
            code = MAINS[arguments[0]](arguments[1:])
        return Ended(code, printed.getvalue(), 0.1)
