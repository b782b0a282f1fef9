"""One rank of the test of the watchdog: a straight run, then one in which rank 1 hangs, once in each of two places.

Not a test itself: `test_watchdog.py` starts it. Arguments: a folder, then overrides of `digits`.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.algorithm.method import Method, Part
from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.statistics import Statistics
from trainer.config.io import load_config
from trainer.engine.ranks import Ranks
from trainer.rank.progress import SignalDriver
from trainer.rank.step.updates import Update, Updates
from trainer.rank.worker import run_rank

FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
PLACES = {6: "stopped", 7: "asleep"}
"""Where rank 1 hangs, by the step that is being made: once each, and in no step with an allowance."""


def hang(step: int) -> None:
    """In the middle of a step: D is updated, G is not."""
    mark = FOLDER / PLACES.get(step, "nowhere")
    if RANK != 1 or step not in PLACES or mark.exists():
        return
    mark.touch()
    if step == 6:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        oversleep()


def oversleep() -> None:
    """The test looks for this name in the traces."""
    time.sleep(600)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    leave = Ranks.leave
    Ranks.leave = lambda self: None  # one group for both runs
    configs = {
        name: load_config("digits", [*sys.argv[2:], f"run.directory={FOLDER / name}"]) for name in ("straight", "hung")
    }
    run_rank(configs["straight"], SignalDriver(None))  # when it is started anew, this finds all done

    of_step = Updates.of_step

    def hanging(self: Updates, method: Method[Any], step: int, raw: Sequence[RawBatch]) -> Update:
        update = of_step(self, method, step, raw)

        def make(part: Part) -> Statistics:
            if part == "g":
                hang(step + 1)
            return update(part)

        return make

    Updates.of_step = hanging
    run_rank(configs["hung"], SignalDriver(None))
    leave(Ranks(RANK, 2, configs["hung"].scaling.device, None))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
