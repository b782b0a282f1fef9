"""Where the hours of a run went, from its event logs.

Rank 0's log says how long it has been in which phase and which steps were done; the driver's log says when the run
waited for nodes. The time between two processes belongs to the driver that lived meanwhile, or to nobody: a pause.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.timing.event_log import Event, events_file, read_events

CATEGORIES = {
    "computing": "computing",
    "data": "waiting for data",
    "checkpoints": "saving checkpoints",
    "evaluation": "evaluation and sample grids",
    "start": "first start and compilation",
    "restarts": "starting again",
    "lost": "lost work, done again",
    "nodes": "waiting for nodes",
    "closing": "last checkpoint, uploads, profiles",
    "away": "pauses, in which nothing ran",
}
"""In the order of the report, with what each is called."""
_OF_PHASE = {
    "data": "data",
    "sampling": "evaluation",
    "checkpoint": "checkpoints",
    "end": "closing",
    "profile": "closing",
}
"""Categories of rank 0's phases, other than its start; the others are computing."""
_WORK = frozenset({"computing", "data", "checkpoints", "evaluation", "closing"})
"""What a failure can undo."""
STOPPED_S = 1.0
"""A process that misses so much of the time on the wall was stopped, or its machine was."""
LONGEST_S = 1e9
"""A phase of 30 years is damaged."""
REASON_S = 120.0
"""How long after its ranks have failed a driver may say so."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A start that ended by itself."""

    at: float
    """Its last sign of life, in s since 1970."""
    step: int
    """Optimizer steps done."""
    reason: str
    """Why, as far as it is known."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One life of rank 0."""

    began: float
    """In s since 1970."""
    ended: float
    """Its last record, in s since 1970."""
    first_step: int
    """Steps that were done already."""
    last_step: int
    """Steps that were done at its end."""
    status: str | None
    """FINISHED, KILLED (stopped on request) or FAILED; None: it left no word."""
    facts: dict[str, Any]
    """What it said of its machine, see `Worker`."""

    @property
    def world_size(self) -> int:
        """Its ranks."""
        found = self.facts.get("world_size")
        return found if type(found) is int and found > 0 else 1

    @property
    def on_gpus(self) -> bool:
        """Whether its ranks had a GPU each."""
        return self.facts.get("device", "CPU") != "CPU"


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Where the time of a run went.

    Attributes:
        began, ended: of the run, in s since 1970.
        seconds: of each of the `CATEGORIES`; they add up to the time between the two.
        rank_seconds: time in which ranks were held, times their number.
        gpu_seconds: the same, of ranks with a GPU.
        starts: the lives of rank 0.
        failures: those of them that ended by themselves.
        steps: optimizer steps that were kept, without the first of each start.
        lost_steps: those that were done again.
        saves: checkpoints that were begun.
        save_s: time for which one of them held training up, on average; 0 without any.
    """

    began: float
    ended: float
    seconds: dict[str, float]
    rank_seconds: float
    gpu_seconds: float
    starts: tuple[Start, ...]
    failures: tuple[Failure, ...]
    steps: int
    lost_steps: int
    saves: int
    save_s: float

    @property
    def wall_s(self) -> float:
        """Time between the first start and the end."""
        return self.ended - self.began

    @property
    def held_s(self) -> float:
        """That time without pauses and without waiting for nodes."""
        return self.wall_s - self.seconds["away"] - self.seconds["nodes"]

    @property
    def goodput(self) -> float:
        """Share of the held time in which the networks learned what they kept."""
        return self.seconds["computing"] / self.held_s if self.held_s > 0 else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of one kept step with its data, 0 without any."""
        return (self.seconds["computing"] + self.seconds["data"]) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class _Piece:
    """A stretch of time.

    Attributes:
        category: where it went.
        seconds: how long it was.
        before, after: steps done at its beginning and at its end.
        ranks, gpus: held meanwhile.
    """

    category: str
    seconds: float
    before: int
    after: int
    ranks: int
    gpus: int


def read_hours(run_directory: Path, *, running: bool = False) -> Hours | None:
    """The account of a run; None if it has no event log, because an earlier version made it.

    Args:
        run_directory: folder of the run.
        running: whether its last start still lives, and has not failed.
    """
    of_rank = _by_start(read_events(events_file(run_directory, "rank-0")))
    drivers = [_Driver(events) for events in _by_start(read_events(events_file(run_directory, "driver")))]
    lives = [life for events in of_rank if (life := _Life.of(events))]
    while len(lives) > 1 and lives[-2].start.status == "FINISHED" and lives[-1].did_nothing:
        lives.pop()  # the command was given again after the end
    if not lives:
        return None
    account = _Account()
    first, last = lives[0].start, lives[-1].start
    account.now = min([first.began, *(driver.began for driver in drivers)])
    began = account.now
    for life in lives:
        account.add_gap(life.start.began, drivers, "restarts" if account.lives else "start")
        account.add(life)
    late = [driver for driver in drivers if last.status != "FINISHED" or driver.began < last.ended]
    end = max([account.now, *(driver.ended for driver in late)])
    account.add_gap(end, late, "closing" if last.status in ("FINISHED", "KILLED") else "restarts")
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for piece in account.pieces:
        seconds[piece.category] += piece.seconds
    held = [piece for piece in account.pieces if piece.category not in ("away", "nodes")]
    kept = [piece for piece in held if piece.category == "computing"]
    saves = sum(life.saves for life in lives)
    return Hours(
        began=began,
        ended=end,
        seconds=seconds,
        rank_seconds=sum(piece.seconds * piece.ranks for piece in held),
        gpu_seconds=sum(piece.seconds * piece.gpus for piece in held),
        starts=tuple(life.start for life in lives),
        failures=tuple(_failures([life.start for life in lives], drivers, running)),
        steps=sum(piece.after - piece.before for piece in kept),
        lost_steps=account.lost_steps,
        saves=saves,
        save_s=sum(life.save_s for life in lives) / saves if saves else 0.0,
    )


def _by_start(events: Sequence[Event]) -> list[list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.start, []).append(event)
    return list(found.values())


def _seconds(event: Event) -> dict[str, float]:
    found = event.fields.get("seconds")
    pairs = found.items() if isinstance(found, dict) else ()
    return {phase: float(s) for phase, s in pairs if type(s) in (int, float) and 0 <= s < LONGEST_S}


def _step(event: Event, default: int) -> int:
    found = event.fields.get("step")
    return found if type(found) is int and found >= 0 else default


@dataclass(frozen=True)
class _Life:
    """One life of rank 0, with its records."""

    start: Start
    events: list[Event]

    @classmethod
    def of(cls, events: list[Event]) -> "_Life | None":
        # By the time of the process itself: a record from time to time can pass one that waits to be written.
        timed = [event for event in events if _seconds(event)]
        events = sorted(timed, key=lambda event: sum(_seconds(event).values()))
        if not events:
            return None
        resumed = next((_step(event, 0) for event in events if event.kind == "resumed"), 0)
        facts = next((event.fields for event in events if event.kind == "start"), {})
        status = next((event.fields.get("status") for event in events if event.kind == "end"), None)
        return cls(
            Start(
                began=events[0].at - sum(_seconds(events[0]).values()),
                ended=events[-1].at,
                first_step=resumed,
                last_step=_step(events[-1], resumed),
                status=status if isinstance(status, str) else None,
                facts=facts,
            ),
            events,
        )

    @property
    def did_nothing(self) -> bool:
        return self.start.last_step == self.start.first_step

    @property
    def saves(self) -> int:
        return sum(event.kind == "phase" and event.fields.get("phase") == "checkpoint" for event in self.events)

    @property
    def save_s(self) -> float:
        return _seconds(self.events[-1]).get("checkpoint", 0.0)


class _Driver:
    """One life of the process that starts the ranks."""

    def __init__(self, events: Sequence[Event]) -> None:
        timed = sorted(events, key=lambda event: event.at)
        self.events = timed
        self.began = timed[0].at - sum(_seconds(timed[0]).values())
        self.ended = timed[-1].at
        self.waits = [
            (event.at, later.at) for event, later in itertools.pairwise(timed) if event.fields.get("phase") == "waiting"
        ]


class _Account:
    """The pieces of a run's time so far, without a hole."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.now, self.lives, self.lost_steps = 0.0, 0, 0
        self._step, self._ranks, self._gpus = 0, 1, 0

    def add_gap(self, until: float, drivers: Sequence[_Driver], category: str) -> None:
        """The time until `until`, in which no rank 0 lived: that of a driver, of missing nodes, or nobody's."""
        marks = {until, *(mark for driver in drivers for mark in (driver.began, driver.ended))}
        marks |= {mark for driver in drivers for wait in driver.waits for mark in wait}
        for mark in sorted(mark for mark in marks if self.now < mark <= until):
            middle = (self.now + mark) / 2
            living = [driver for driver in drivers if driver.began <= middle <= driver.ended]
            waits = any(first <= middle <= last for driver in living for first, last in driver.waits)
            self._append("nodes" if waits else category if living else "away", mark - self.now, self._step)
            self.now = mark

    def add(self, life: _Life) -> None:
        """The time of a life, by its phases."""
        self._ranks = life.start.world_size
        self._gpus = self._ranks if life.start.on_gpus else 0
        if not self.lives:
            self.pieces = [replace(piece, ranks=self._ranks, gpus=self._gpus) for piece in self.pieces]
        before: dict[str, float] = {}
        warm = False
        for event in life.events:
            now = _seconds(event)
            spent = {phase: max(0.0, now[phase] - before.get(phase, 0.0)) for phase in now}
            before = now
            wall, total = max(0.0, event.at - self.now), sum(spent.values())
            if wall - total > STOPPED_S:
                self._append("away", wall - total, self._step)
                wall = total
            elif total == 0.0:
                spent, total = {str(event.fields.get("phase")): wall}, wall
            # Two clocks differ a little, and two processes may overlap: what remains is shared out.
            scale = wall / total if total else 0.0
            after = self._step if event.kind == "resumed" else max(self._step, _step(event, self._step))
            started = spent.pop("start", 0.0)
            self._append("restarts" if self.lives or warm else "start", started * scale, self._step)
            if started and after > self._step:
                self._step, warm = self._step + 1, True  # the first step belongs to the start
            of_steps = dict.fromkeys(("computing", "data"), 0.0)
            for phase, seconds in spent.items():
                category = _OF_PHASE.get(phase, "computing")
                if category in of_steps:
                    of_steps[category] += seconds
                else:  # its beginning was recorded, so it belongs to the step that was done then
                    self._append(category, seconds * scale, self._step)
            for category, seconds in of_steps.items():
                self._append(category, seconds * scale, after)
            self.now = max(self.now, event.at)
            if event.kind == "resumed":
                self._go_back(_step(event, 0))
            else:
                self._step = after
        self.lives += 1

    def _append(self, category: str, seconds: float, after: int) -> None:
        if seconds > 0:
            self.pieces.append(_Piece(category, seconds, self._step, after, self._ranks, self._gpus))

    def _go_back(self, step: int) -> None:
        """What was done after `step` is lost."""
        self.lost_steps += max(0, self._step - step)
        self.pieces = list(itertools.chain.from_iterable(_split(piece, step) for piece in self.pieces))
        self._step = step


def _split(piece: _Piece, step: int) -> Iterator[_Piece]:
    """A piece, or its parts before and after `step`, of which the second is lost."""
    if piece.category not in _WORK or piece.after <= step:
        yield piece
        return
    kept = (step - piece.before) / (piece.after - piece.before) if piece.before < step else 0.0
    if kept:
        yield replace(piece, seconds=piece.seconds * kept, after=step)
    yield replace(piece, category="lost", seconds=piece.seconds * (1 - kept), before=step, after=step)


def _failures(starts: Sequence[Start], drivers: Sequence[_Driver], running: bool) -> Iterator[Failure]:
    dead = [start for start in starts if start.status not in ("FINISHED", "KILLED")]
    dead = dead[:-1] if running and dead and dead[-1] is starts[-1] else dead
    told: dict[int, str] = {}
    for event in (event for driver in drivers for event in driver.events if "reason" in event.fields):
        before = [i for i, start in enumerate(dead) if start.ended <= event.at <= start.ended + REASON_S]
        if before:
            told.setdefault(before[-1], str(event.fields["reason"]))
    for i, start in enumerate(dead):
        reason = "an error ended it" if start.status else "it was killed, or its machine was lost"
        yield Failure(at=start.ended, step=start.last_step, reason=told.get(i, reason))
