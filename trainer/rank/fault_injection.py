"""Fault injection: a rank that kills itself at a chosen point, so that resuming can be tested anywhere.

In every other respect it is a worker: `python -m trainer.rank.fault_injection --config X --kill '{...}'`, or the same
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
        signal: SIGKILL is the end; SIGTERM asks for a checkpoint first.
        ranks: that are killed.
        step: which step of this start, from 1 on.
        file_event: None: kill in that step; n: when, from that step on, something is done to a file of a checkpoint
            for the n-th time, from 0 on: a part is opened, a manifest renamed, a superseded file removed.
        delay: how long after that, in [0, 1] of a step's time, or of 20 ms after a file event.
    """

    signal: Literal["SIGKILL", "SIGTERM"]
    ranks: tuple[int, ...]
    step: int
    file_event: int | None
    delay: float

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Kill":
        """The other way."""
        fields = json.loads(text)
        return cls(**(fields | {"ranks": tuple(fields["ranks"])}))


class KilledDriver(SignalDriver):
    """Counts the steps that are begun, and kills its own process in or after one of them."""

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
                # The interpreter's own reports of what is done to files: they see each phase of a save in whatever
                # thread it happens, and the code that saves knows nothing of them.
                sys.addaudithook(self._count)
        return super().stop_requested()

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS or not str(arguments[0]).startswith(f"{self._checkpoints}/step-"):
            return
        if self._file_events == self._kill.file_event:
            delay = self._kill.delay
            self._die(LONGEST_DELAY_S * (2 * delay - 1) if delay > 0.5 else 0.0)  # half of all: before it is done
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
    """The command. Its errors are tracebacks: `verify_resume` has checked what a user may get wrong."""
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
