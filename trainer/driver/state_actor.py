"""The state that the driver and the workers of a run share, and the record of failed worker groups.

Ray runs `StateActor` as an actor; nothing here needs Ray.
"""

import asyncio
import re
from dataclasses import dataclass, replace
from itertools import takewhile

from trainer.rank.progress import Outcome, RunStatus

SAME_STEP_LIMIT = 3
LONGEST_PAUSE_S = 60.0
_LOST_PEER = re.compile(r"gloo|NCCL|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)


def is_lost_peer(error: str) -> bool:
    """Whether an error's message only says that another rank is gone."""
    return bool(_LOST_PEER.search(error))


@dataclass(frozen=True)
class FinalError:
    """An error that a restart would not fix.

    Attributes:
        message: for the user.
        is_refusal: whether the user's input is wrong; otherwise the run has failed.
        diverged: whether too many updates in a row were skipped.
    """

    message: str
    is_refusal: bool
    diverged: bool = False


@dataclass(frozen=True)
class Failure:
    """How a group of workers failed.

    Attributes:
        step: optimizer steps that the run had done, as far as the actor knows; None: the group did none.
        error: first line of the error.
    """

    step: int | None
    error: str

    @property
    def where(self) -> str:
        """Where it failed, as text."""
        return "before the first step of a start" if self.step is None else f"after step {self.step}"

    @property
    def is_lost_peer(self) -> bool:
        """Whether the error only says that another rank is gone, which is rarely the cause."""
        return is_lost_peer(self.error)


class Failures:
    """The failures of a run in order; they decide on pauses and on giving up."""

    def __init__(self) -> None:
        self._all: list[Failure] = []
        self._furthest_step = -2
        self._in_a_row = 0

    def add(self, failure: Failure) -> None:
        """Record the failure of a group."""
        step = -1 if failure.step is None else failure.step
        self._in_a_row = 1 if step > self._furthest_step else self._in_a_row + 1
        self._furthest_step = max(self._furthest_step, step)
        self._all.append(failure)

    def pause_s(self) -> float:
        """Seconds to wait before the next start: 0 after one failure, then 2, 4, ... up to 60.

        If the run got further than ever before, the count starts again at one failure.
        """
        return min(2.0 ** (self._in_a_row - 1), LONGEST_PAUSE_S) if self._in_a_row > 1 else 0.0

    def hopeless(self) -> str | None:
        """Why another start would fail again, if the same step has failed `SAME_STEP_LIMIT` times; else None."""
        if not self._all:
            return None
        last = self._all[-1]
        same_step = [failure.step == last.step for failure in self._all]
        # Failures before the first step count only if they are consecutive.
        counted = takewhile(bool, reversed(same_step)) if last.step is None else same_step
        times = sum(counted)
        if times < SAME_STEP_LIMIT:
            return None
        return f"the workers failed {times} times {last.where}, the last time with: {last.error}"

    def last(self) -> str | None:
        """The last failure as text; None if there was none."""
        if not self._all:
            return None
        return f"failure {len(self._all)} of the workers, {self._all[-1].where}: {self._all[-1].error}"

    @property
    def count(self) -> int:
        """Number of failures."""
        return len(self._all)

    def summary(self, max_failures: int) -> str | None:
        """Why the run ended, for a run that Ray no longer restarts; None if the actor knows of no failure."""
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
        status: the newest status, or None.
        result: how the run ended, or None.
        world_size: ranks of the running group, or None between two groups.
        failure: the last failure as text, or None.
    """

    status: RunStatus | None
    result: Outcome | FinalError | None
    world_size: int | None
    failure: str | None


class StateActor:
    """Passes the status from workers to driver, and the request to stop back. Other processes call its methods.

    Ranks send without waiting, so a rank that was cut off may be heard when the next group has long begun: each message
    names its group, and those of groups that have ended are dropped.
    """

    def __init__(self) -> None:
        self._status: RunStatus | None = None
        self._stop = asyncio.Event()
        self._result: Outcome | FinalError | None = None
        self._world_size: int | None = None
        self._group: str | None = None
        self._ended: set[str | None] = set()
        self._failures = Failures()
        self._failure: Failure | None = None  # of the newest group, as reported by its ranks
        self._running = False
        self._step: int | None = None  # reported by the newest group

    async def begin(self, group: str, world_size: int) -> float | None:
        """Called by rank 0 of a new group before it starts.

        Args:
            group: a name that no other group has.
            world_size: its ranks.

        Returns:
            Seconds to wait, or None if it must not start; `read` then gives the reason.
        """
        self._settle()
        reason = self._failures.hopeless()
        if reason:
            self._result = FinalError(reason, is_refusal=False)
            return None
        self._ended.add(self._group)
        self._running, self._group, self._world_size, self._step = True, group, world_size, None
        return self._failures.pause_s()

    async def post(self, group: str, status: RunStatus) -> None:
        """Keep the newest status."""
        if group in self._ended:
            return
        self._status, self._step = status, status.step

    async def post_result(self, group: str, result: Outcome | FinalError) -> None:
        """Record how the run ended; a final error is not overwritten by other ranks' results."""
        if group in self._ended:
            return
        self._running, self._world_size = False, None
        if not isinstance(self._result, FinalError):
            self._result = result

    async def post_error(self, group: str, error: str, step: int | None) -> None:
        """Record that a rank failed; Ray will restart the group.

        Args:
            group: that of the rank.
            error: first line of the error.
            step: optimizer steps done, if this rank knows.
        """
        if group in self._ended:
            return
        self._world_size = None
        failure = Failure(self._step if step is None else step, error)
        if self._failure is None:
            self._failure = failure
            return
        # One rank fails first and the others follow: keep the error of the first, and the step from rank 0.
        if self._failure.is_lost_peer and not failure.is_lost_peer:
            self._failure = replace(self._failure, error=error)
        if step is not None:
            self._failure = replace(self._failure, step=step)

    async def ask_to_stop(self) -> None:
        """Ask the workers to stop; called by the driver."""
        self._stop.set()

    async def stop_asked(self) -> bool:
        """Return when the driver asks to stop, not before."""
        return await self._stop.wait()

    async def withdraw_stop(self) -> None:
        """Clear the stop; called by the driver when another group will continue the run."""
        self._stop.clear()
        self._result = None

    async def read(self) -> Snapshot:
        """The current state; called by the driver."""
        return Snapshot(self._status, self._result, self._world_size, self._failures.last())

    async def count_failures(self) -> int:
        """Number of failures; called by the driver between two groups."""
        self._settle()
        return self._failures.count

    async def summarize_failures(self, max_failures: int) -> str | None:
        """Called by the driver when Ray has given up; see `Failures.summary`."""
        self._settle()
        return self._failures.summary(max_failures)

    def _settle(self) -> None:
        """Record a failure if the newest group did not end well, even if its processes were killed without a report."""
        if self._running:
            unreported = Failure(self._step, "the processes of the workers were killed or lost")
            self._failures.add(self._failure or unreported)
        self._running, self._world_size, self._failure = False, None, None
