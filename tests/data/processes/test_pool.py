"""Results come in the order of the tasks, errors reach the caller, and no process is left."""

import multiprocessing
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from data.processes.pool import WorkerError, map_in_order


def pids_of_children() -> set[int]:
    # The server and the resource tracker stay, as they do with any use of multiprocessing.
    return {child.pid for child in psutil.Process().children() for child in child.children()}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(map_in_order(operator.neg, range(50), workers)) == [-number for number in range(50)]


def test_slow_first_task_holds_back_the_others_but_not_their_order() -> None:
    started = time.monotonic()
    assert list(map_in_order(time.sleep, [0.5, 0, 0, 0], 2)) == [None] * 4
    assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_tasks_are_taken_as_they_are_needed(workers: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_in_order(operator.neg, tasks(), workers)
    assert [next(results) for _ in range(10)] == [-number for number in range(10)]
    assert len(taken) <= 10 + 4 * workers
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_task_is_raised_in_its_place(workers: int) -> None:
    tasks: list[Any] = [1, "no number", 3]
    results = map_in_order(operator.neg, tasks, workers)
    assert next(results) == -1
    with pytest.raises(TypeError, match="bad operand"):
        next(results)


def test_killed_worker_is_told() -> None:
    with pytest.raises(WorkerError, match=r"a worker process was killed, .* run again with fewer --workers"):
        list(map_in_order(os._exit, [1, 2, 3], 2))


def die_within_the_answer(number: int) -> bytes:
    """An answer that fits no pipe; the process is killed while the pipe is full of its beginning."""
    main = threading.get_ident()

    def kill_when_sending() -> None:
        while sys._current_frames()[main].f_code.co_name not in ("_send", "_send_bytes"):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if number == 3:
        threading.Thread(target=kill_when_sending, daemon=True).start()
        return bytes(2**28)
    return b""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_worker_that_is_killed_within_its_answer_is_told_and_does_not_stop_the_command_for_ever() -> None:
    before = pids_of_children()
    with pytest.raises(WorkerError, match="a worker process was killed"):
        list(map_in_order(die_within_the_answer, range(50), 2))
    assert pids_of_children() <= before


def test_closing_ends_the_workers() -> None:
    before = pids_of_children()
    results = map_in_order(operator.neg, range(1000), 2)
    next(results)
    assert len(pids_of_children() - before) == 2
    results.close()
    assert pids_of_children() <= before
    assert multiprocessing.active_children() == []
