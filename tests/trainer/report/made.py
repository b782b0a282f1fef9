"""Run directories as a run leaves them, written by the same writers, but with clocks that the test moves."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config.io import load_config, shown_config
from trainer.timing.event_log import Writer, events_file
from trainer.timing.time_sheet import TimeSheet
from trainer.tracking.spool import Spool

HOUR = 3600.0
SLOW = ("start", "sampling", "checkpoint", "end")


class Clock:
    """Seconds since 1970; stands still until it is moved."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Life:
    """A process of a run that records its phases: it spends time by the clock alone."""

    def __init__(self, directory: Path, clock: Clock, writer: Writer = "rank-0", world_size: int = 2, **facts: Any):
        recorded, starts = ("ranks", "waiting") if writer == "driver" else SLOW, writer == "rank-0"
        facts = {"device": "CPU", "processor": "a processor", "precision": "fp32", "tags": {}} | facts
        self.clock = clock
        self.sheet = TimeSheet(
            events_file(directory, writer),
            recorded=recorded,
            warms_up=starts,
            clock=clock,
            wall_clock=clock,
            world_size=world_size,
            **facts,
        )

    def resume(self, step: int, seconds: float) -> None:
        self.clock.now += seconds
        self.sheet.resume(step)

    def spend(self, phase: str, seconds: float) -> None:
        self.sheet.enter(phase)
        self.clock.now += seconds

    def steps(self, first: int, last: int, *, g: float, data: float = 0.0) -> None:
        """Steps `first` to `last`, each with so many seconds."""
        for step in range(first, last + 1):
            self.spend("data", data)
            self.spend("g", g)
            self.sheet.end_step(step)
            self.sheet.enter("log")

    def die(self) -> None:
        """As SIGKILL does: what has been recorded stays, and there is no end record."""
        self.sheet.tell("standing")
        log = self.sheet._log
        assert log
        log.close()


def live_twice(
    directory: Path, clock: Clock, driver: Life | None = None, *, pause_s: float = 0.0, **facts: Any
) -> None:
    """A start that is killed after step 12, and one that goes on from the checkpoint of step 10 to the end, step 15.

    Args:
        directory: of the run.
        clock: is moved.
        driver: waits for nodes for a minute before each, and says why the first one ended.
        pause_s: after each.
        facts: of both.
    """
    for first, last in ((1, 12), (11, 15)):
        if driver:
            driver.spend("waiting", 60)
            driver.sheet.enter("ranks")
        life = Life(directory, clock, **facts)
        life.resume(first - 1, 10)
        life.steps(first, 10, g=1)
        life.spend("checkpoint", 0.5)
        life.steps(max(first, 11), last, g=1)
        if last == 15:
            life.sheet.close(status="FINISHED")
        else:
            life.die()
            if driver:
                driver.sheet.tell("restarted", reason="failure 1 of the workers")
        clock.now += pause_s


def made_run(directory: Path, *overrides: str, curves: Mapping[str, list[tuple[int, float]]] | None = None) -> Path:
    """A directory with a config, a spool and three grids of samples."""
    directory.mkdir(parents=True)
    config = load_config("digits", [f"run.directory={directory}", *overrides])
    (directory / "config.yaml").write_text(shown_config(config))
    spool = Spool(directory)
    spool.open(step=None, run_id=None, run_name=directory.name, backends=["tensorboard"], params={}, tags={})
    curves = curves or {"loss_g": [(5, 0.5), (10, 0.25), (15, 0.75)]}
    for name, points in curves.items():
        for step, value in points:
            spool.metrics(step, {name: value})
    spool.close("FINISHED")
    (directory / "samples").mkdir()
    for step in (5, 10, 15):
        Image.new("L", (8, 8), 16 * step).save(directory / "samples" / f"step-{step:08d}.png")
    return directory


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
