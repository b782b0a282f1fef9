"""Fault injection: a rank that kills itself at a chosen point, so that resuming can be tested from any point.

Otherwise it is an ordinary worker: `python -m trainer.rank.fault_injection --config X --kill '{...}'`, or the same
under torchrun. `trainer.verify_resume` starts it.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.command_line import add_config_arguments, start_logging
from trainer.config.io import load_config
from trainer.rank.progress import SignalDriver
from trainer.rank.worker import run_rank

MARK = "killed by"
LONGEST_DELAY_S = 0.02
_FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"})


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill.

    Attributes:
        signal: SIGKILL ends the process at once; SIGTERM asks for a checkpoint first.
        ranks: the ranks that are killed.
        step: the step within this start, counted from 1.
        file_event: None: kill in that step. n: kill at the n-th operation, counted from 0, on a checkpoint's file from
            that step on, such as opening a part, renaming a manifest or removing a superseded file.
        delay: time until the kill, in [0, 1], in units of a step's time, or of 20 ms after a file event.
    """

    signal: Literal["SIGKILL", "SIGTERM"]
    ranks: tuple[int, ...]
    step: int
    file_event: int | None
    delay: float

    def to_json(self) -> str:
        """As JSON, for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Kill":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**(fields | {"ranks": tuple(fields["ranks"])}))


class KilledDriver(SignalDriver):
    """Counts the steps that have begun, and kills its own process in or after one of them."""

    def __init__(self, kill: Kill, checkpoints: Path) -> None:
        super().__init__(None)
        self._kill, self._checkpoints = kill, checkpoints
        self._begun, self._file_events = 0, 0
        self._began_at, self._step_s = time.monotonic(), 0.0

    def stop_requested(self) -> bool:
        """Called before each step, on each rank."""
        now = time.monotonic()
        self._step_s, self._began_at = now - self._began_at, now
        self._begun += 1
        if self._begun == self._kill.step:
            if self._kill.file_event is None:
                self._die(self._kill.delay * self._step_s)
            else:
                # The interpreter's audit events see every file operation of a save, in any thread, without any change
                # to the code that saves.
                sys.addaudithook(self._count)
        return super().stop_requested()

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS or not str(arguments[0]).startswith(f"{self._checkpoints}/step-"):
            return
        if self._file_events == self._kill.file_event:
            delay = self._kill.delay
            self._die(LONGEST_DELAY_S * (2 * delay - 1) if delay > 0.5 else 0.0)  # half of them: before the operation
        self._file_events += 1

    def _die(self, delay_s: float) -> None:
        def die() -> None:
            time.sleep(delay_s)
            os.write(2, f"\n{MARK} {self._kill.signal}\n".encode())
            os.kill(os.getpid(), getattr(signal, self._kill.signal))

        if delay_s:
            threading.Thread(target=die, daemon=True).start()
        else:
            die()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. It may fail with tracebacks, because `verify_resume` has already checked the user's input."""
    parser = argparse.ArgumentParser(prog="python -m trainer.rank.fault_injection", description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--kill", type=Kill.from_json, help="JSON of a Kill; without it this is a plain worker")
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    start_logging(rank)
    config = load_config(options.config, [*options.set, f"scaling.world_size={os.environ.get('WORLD_SIZE', 1)}"])
    kill: Kill | None = options.kill
    driver = SignalDriver(None)
    if kill and rank in kill.ranks:
        driver = KilledDriver(kill, Path(config.run.directory) / "checkpoints")
    run_rank(config, driver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
