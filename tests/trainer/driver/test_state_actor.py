"""What follows from a group of workers that failed: a pause, another start, or the end."""

import asyncio
import itertools
import subprocess
import sys

import pytest

from tests.launch import ROOT
from trainer.driver.state_actor import Failure, Failures, FinalError, Snapshot, StateActor
from trainer.rank.progress import Outcome, RunStatus

NUMBERS = itertools.count(1)
LOST = "rank 1: RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:4711"


def status(step: int) -> RunStatus:
    return RunStatus(step=step, images=step * 16, total_images=1600)


async def begin(state: StateActor, world_size: int) -> tuple[str, float | None]:
    """A new group: its name, and the pause before it."""
    group = f"group {next(NUMBERS)}"
    return group, await state.begin(group, world_size)


async def fail_group(state: StateActor, *, step: int | None, error: str = "rank 0: OSError: broken") -> float | None:
    """One group that starts, reaches a step and fails; returns the pause before it."""
    group, pause_s = await begin(state, 2)
    if step is not None:
        await state.post(group, status(step))
    await state.post_error(group, error, None)
    return pause_s


@pytest.mark.parametrize(
    ("steps", "pause_s"),
    [
        ([], 0),
        ([5], 0),
        ([5, 5], 2),
        ([5, 3, 4], 4),
        ([None, None], 2),
        ([7] + [5] * 5, 32),
        ([7] + [5] * 6, 60),
        ([5, 5, 6], 0),  # it got further
    ],
)
def test_first_restart_is_at_once_and_the_next_ones_back_off(steps: list[int | None], pause_s: float) -> None:
    failures = Failures()
    for step in steps:
        failures.add(Failure(step, "x"))
    assert failures.pause_s() == pause_s


def test_third_failure_at_a_step_ends_the_run_with_step_number_and_cause() -> None:
    async def play() -> tuple[list[float | None], Outcome | FinalError | None]:
        state = StateActor()
        pauses = [await fail_group(state, step=step) for step in (8, 3, 8, 8)]
        pauses.append((await begin(state, 2))[1])
        return pauses, (await state.read()).result

    pauses, result = asyncio.run(play())
    assert pauses == [0, 0, 2, 4, None]
    assert result == FinalError(
        "the workers failed 3 times after step 8, the last time with: rank 0: OSError: broken", is_refusal=False
    )


def test_groups_that_never_reach_a_step_are_counted_together() -> None:
    async def play() -> Outcome | FinalError | None:
        state = StateActor()
        group, _ = await begin(state, 1)
        await state.post(group, status(8))
        for _ in range(3):  # killed without a word, the first one at step 8
            await begin(state, 1)
        assert (await state.read()).result is None
        await begin(state, 1)
        return (await state.read()).result

    result = asyncio.run(play())
    assert isinstance(result, FinalError)
    assert result.message == (
        "the workers failed 3 times before the first step of a start, the last time with: the processes of the workers "
        "were killed or lost"
    )


def test_starts_that_fail_early_now_and_then_do_not_end_a_run_that_gets_on_between_them() -> None:
    failures = Failures()
    for step in (None, 1000, 50_000, None, 90_000, None, None):
        failures.add(Failure(step, "a node went"))
        assert failures.hopeless() is None
    failures.add(Failure(None, "a node went"))
    assert failures.hopeless() == (
        "the workers failed 3 times before the first step of a start, the last time with: a node went"
    )


def test_limit_of_failures_holds_over_all_calls_of_ray_train() -> None:
    async def play() -> list[int]:
        state, counts = StateActor(), []
        for step in (3, 5):
            await fail_group(state, step=step)
            counts.append(await state.count_failures())
            counts.append(await state.count_failures())  # to look does not count
        return counts

    assert asyncio.run(play()) == [1, 1, 2, 2]


@pytest.mark.parametrize("cause_first", [True, False])
def test_cause_is_what_a_rank_says_that_did_not_merely_lose_another(cause_first: bool) -> None:
    async def play() -> str | None:
        state = StateActor()
        group, _ = await begin(state, 2)
        await state.post(group, status(4))
        words = [("rank 1: OSError: no space", None), (LOST, 6)]
        for error, step in words if cause_first else reversed(words):
            await state.post_error(group, error, step)
        return await state.summarize_failures(0)

    assert asyncio.run(play()) == (
        "the workers failed 1 times, more often than scaling.max_failures (0) allows; the last time after step 6 with: "
        "rank 1: OSError: no space"
    )


def test_groups_that_stop_when_asked_are_no_failures() -> None:
    async def play() -> str | None:
        state = StateActor()
        waiting = asyncio.create_task(state.stop_asked())
        for _ in range(4):
            group, _ = await begin(state, 2)
            await state.ask_to_stop()
            assert await waiting
            await state.post_result(group, Outcome(False, 4, 64, "step-4", None, None))
            assert (await state.read()).world_size is None
            await state.withdraw_stop()
            assert (await state.read()).result is None
            waiting = asyncio.create_task(state.stop_asked())
            await asyncio.sleep(0)
            assert not waiting.done()
        waiting.cancel()
        return await state.summarize_failures(3)

    assert asyncio.run(play()) is None


def test_an_error_that_ends_the_run_stays_whatever_the_other_ranks_say() -> None:
    async def play() -> Outcome | FinalError | None:
        state, final = StateActor(), FinalError("data.path is gone", is_refusal=True)
        group, _ = await begin(state, 2)
        await state.post_result(group, final)
        await state.post_result(group, Outcome(True, 10, 160, "step-10", None, None))
        return (await state.read()).result

    assert asyncio.run(play()) == FinalError("data.path is gone", is_refusal=True)


def test_each_failure_is_told_once_it_is_counted() -> None:
    async def play() -> list[str | None]:
        state = StateActor()
        told = [(await state.read()).failure]
        await fail_group(state, step=8)
        told.append((await state.read()).failure)  # others of the group may still say why
        await fail_group(state, step=8)
        told.append((await state.read()).failure)
        return told

    expected = "failure 1 of the workers, after step 8: rank 0: OSError: broken"
    assert asyncio.run(play()) == [None, None, expected]


def test_what_a_rank_of_an_earlier_group_says_late_changes_nothing_of_the_newest_group() -> None:
    async def play() -> tuple[Snapshot, Snapshot, str | None]:
        state = StateActor()
        cut_off, _ = await begin(state, 2)
        await state.post(cut_off, status(5))
        running, _ = await begin(state, 1)
        await state.post(running, status(6))
        before = await state.read()
        await state.post(cut_off, status(5))
        await state.post_error(cut_off, LOST, 5)
        await state.post_result(cut_off, Outcome(True, 10, 160, "step-10", None, None))
        after = await state.read()
        return before, after, await state.summarize_failures(0)

    before, after, told = asyncio.run(play())
    assert after == before
    assert (after.world_size, after.status, after.result) == (1, status(6), None)
    assert told is not None and "2 times" in told
    assert told.endswith("after step 6 with: the processes of the workers were killed or lost")


def test_it_starts_without_torch() -> None:
    code = "import sys, trainer.driver.state_actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
