"""Where the driver and the workers of a run meet, and what is known there of groups of workers that failed.

Ray makes an actor of `StateActor`; nothing here needs Ray.
"""

import asyncio
import re
from dataclasses import dataclass, replace
from itertools import takewhile

from trainer.rank.progress import RunStatus
from trainer.rank.run_folder import Outcome

SAME_STEP_LIMIT = 3


LONGEST_PAUSE_S = 60.0


_LOST_PEER = re.compile(r"gloo|NCCL|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True)
class FinalError:
    """What no restart would help against.

    Attributes:
        message: for the user.
        is_refusal: something is wrong with what the user gave; otherwise the run has failed.
    """

    message: str
    is_refusal: bool


@dataclass(frozen=True)
class Failure:
    """How a group of workers ended too early.

    Attributes:
        step: optimizer steps that the run had done, as far as the actor was told; None: the group did none.
        error: its first line.
    """

    step: int | None
    error: str

    @property
    def where(self) -> str:
        """The place in words."""
        return "before the first step of a start" if self.step is None else f"after step {self.step}"

    @property
    def is_lost_peer(self) -> bool:
        """Whether it only says that another rank went away, which is seldom the cause."""
        return bool(_LOST_PEER.search(self.error))


class Failures:
    """The failures of a run in order, and what follows from them."""

    def __init__(self) -> None:
        self._all: list[Failure] = []
        self._furthest_step = -2
        self._in_a_row = 0

    def add(self, failure: Failure) -> None:
        """One group more has failed."""
        step = -1 if failure.step is None else failure.step
        self._in_a_row = 1 if step > self._furthest_step else self._in_a_row + 1
        self._furthest_step = max(self._furthest_step, step)
        self._all.append(failure)

    def pause_s(self) -> float:
        """How long to wait before the next start: not at all after one failure, then 2, 4, ... up to 60 seconds.

        A run that got further than ever before begins again with a start at once.
        """
        return min(2.0 ** (self._in_a_row - 1), LONGEST_PAUSE_S) if self._in_a_row > 1 else 0.0

    def hopeless(self) -> str | None:
        """Why another start would end in the same way, if the same step has failed `SAME_STEP_LIMIT` times."""
        if not self._all:
            return None
        last = self._all[-1]
        alike = [failure.step == last.step for failure in self._all]
        # Starts that do nothing say something only if nothing else has happened between them.
        counted = takewhile(bool, reversed(alike)) if last.step is None else alike
        times = sum(counted)
        if times < SAME_STEP_LIMIT:
            return None
        return f"the workers failed {times} times {last.where}, the last time with: {last.error}"

    @property
    def count(self) -> int:
        """How many."""
        return len(self._all)

    def summary(self, max_failures: int) -> str | None:
        """Why a run ended that Ray does not restart any more; None where the actor knows of no failure."""
        if not self._all:
            return None
        last = self._all[-1]
        return (
            f"the workers failed {len(self._all)} times, more often than scaling.max_failures ({max_failures}) allows; "
            f"the last time {last.where} with: {last.error}"
        )


@dataclass(frozen=True)
class Snapshot:
    """What the driver reads.

    Attributes:
        status: the newest, or None.
        result: how the run ended, or None.
        world_size: ranks of the group that runs, or None between two groups.
    """

    status: RunStatus | None
    result: Outcome | FinalError | None
    world_size: int | None


class StateActor:
    """The newest status one way, the request to stop the other way. Its methods are called from other processes."""

    def __init__(self) -> None:
        self._status: RunStatus | None = None
        self._stop = asyncio.Event()
        self._result: Outcome | FinalError | None = None
        self._world_size: int | None = None
        self._failures = Failures()
        self._failure: Failure | None = None  # of the group that began last, as far as its ranks have said so
        self._running = False
        self._step: int | None = None  # that this group has reported

    async def begin(self, world_size: int) -> float | None:
        """Rank 0 of a new group asks when it may start.

        Returns:
            Seconds to wait, or None if it should not start at all; the driver knows why.
        """
        self._settle()
        reason = self._failures.hopeless()
        if reason:
            self._result = FinalError(reason, is_refusal=False)
            return None
        self._running, self._world_size, self._step = True, world_size, None
        return self._failures.pause_s()

    async def post(self, status: RunStatus) -> None:
        """Keep the newest status."""
        self._status, self._step = status, status.step

    async def post_result(self, result: Outcome | FinalError) -> None:
        """How the run ended; an error that ends it stays whatever the other ranks say."""
        self._running, self._world_size = False, None
        if not isinstance(self._result, FinalError):
            self._result = result

    async def post_error(self, error: str, step: int | None) -> None:
        """A rank failed, and Ray will start the group again.

        Args:
            error: its first line.
            step: optimizer steps done, if this rank knows.
        """
        self._world_size = None
        failure = Failure(self._step if step is None else step, error)
        if self._failure is None:
            self._failure = failure
            return
        # The others fail because one did: what it says is the cause, and rank 0 knows the step.
        if self._failure.is_lost_peer and not failure.is_lost_peer:
            self._failure = replace(self._failure, error=error)
        if step is not None:
            self._failure = replace(self._failure, step=step)

    async def ask_to_stop(self) -> None:
        """From the driver."""
        self._stop.set()

    async def stop_asked(self) -> bool:
        """Answers only when the driver wants to stop."""
        return await self._stop.wait()

    async def go_on(self) -> None:
        """From the driver: after a stop that it asked for, another group will go on."""
        self._stop.clear()
        self._result = None

    async def read(self) -> Snapshot:
        """For the driver."""
        return Snapshot(self._status, self._result, self._world_size)

    async def count_failures(self) -> int:
        """For the driver, between two groups."""
        self._settle()
        return self._failures.count

    async def summarize_failures(self, max_failures: int) -> str | None:
        """For the driver, when Ray has given up; see `Failures.summary`."""
        self._settle()
        return self._failures.summary(max_failures)

    def _settle(self) -> None:
        """Count the group that began last if it did not end well. One whose processes were all killed says nothing."""
        if self._running:
            silent = Failure(self._step, "the processes of the workers were killed or lost")
            self._failures.add(self._failure or silent)
        self._running, self._world_size, self._failure = False, None, None
