"""A rank that stands still ends itself and says where; one that is slow where it may be is left alone."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT, environment, run_python
from tests.trainer.runs import assert_same_state, state_of
from trainer.rank.watchdog import EXIT_CODE, Phase, Watchdog

SCRIPT = Path(__file__).parent / "processes" / "hang_rank.py"

HANGING = """
import ctypes, sys, threading
from pathlib import Path
from trainer.rank.watchdog import Watchdog

def wait_for_ever():
    if sys.argv[2] == "alone":
        c, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # unlike CDLL, PyDLL keeps the lock
        c.pthread_mutex_lock(mutex)
        c.pthread_mutex_lock(mutex)  # a second time: no signal ends this
    threading.Event().wait()

with Watchdog(0.5, rank=3, directory=Path(sys.argv[1])) as watchdog:
    watchdog.end_step()
    watchdog.enter("data")
    wait_for_ever()
"""


def test_a_rank_that_stands_still_ends_with_the_stacks_of_all_threads(tmp_path):
    done = run_python(["-c", HANGING, str(tmp_path / "run"), "waiting"], timeout_s=60)
    assert done.returncode == EXIT_CODE == 75
    for text in (done.stderr, (tmp_path / "run" / "watchdog-rank-3.txt").read_text()):
        assert "rank 3" in text
        assert "has made no progress in phase data for 0." in text
        assert "in wait_for_ever" in text
        assert "in _watch" in text  # another thread


@pytest.mark.slow
def test_one_that_keeps_the_interpreter_to_itself_ends_too(tmp_path):
    done = run_python(["-c", HANGING, str(tmp_path), "alone"], timeout_s=60)
    assert done.returncode == -signal.SIGKILL
    assert "rank 3 (process" in done.stderr and "keeps Python's lock. It is killed" in done.stderr
    assert "in wait_for_ever" in done.stderr


STOPPED = """
import sys, threading
from pathlib import Path
from trainer.rank.watchdog import Watchdog

with Watchdog(1.0, directory=Path(sys.argv[1])) as watchdog:
    watchdog.end_step()
    print("ready", flush=True)
    for line in sys.stdin:
        watchdog.enter("data")
        print("alive", flush=True)
"""


@pytest.mark.slow
def test_one_that_was_stopped_for_longer_than_allowed_continues(tmp_path):
    rank = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdin and rank.stdout
    try:
        assert rank.stdout.readline() == "ready\n"
        rank.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # more than the limit and the grace of both watchers
        rank.send_signal(signal.SIGCONT)
        print("still there?", file=rank.stdin, flush=True)
        assert rank.stdout.readline() == "alive\n"
        rank.stdin.close()
        assert rank.wait(60) == 0
    finally:
        rank.kill()
    assert not any(tmp_path.iterdir())


def test_time_in_which_the_process_was_stopped_does_not_count():
    clock = Clock()
    watchdog = Watchdog(10.0, clock=clock)
    clock.now = 9.0
    watchdog._note_time(looked_at=8.0, pause_s=1.0)
    assert watchdog.standing() == ("start", 9.0, 10.0)
    clock.now = 1000.0
    watchdog._note_time(looked_at=9.0, pause_s=1.0)
    assert watchdog.standing() == ("start", 0.0, 10.0)


def test_a_folder_that_cannot_be_written_does_not_keep_it_alive(tmp_path):
    (tmp_path / "run").write_text("a file")
    done = run_python(["-c", HANGING, str(tmp_path / "run"), "waiting"], timeout_s=60)
    assert done.returncode == EXIT_CODE
    assert "in wait_for_ever" in done.stderr


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_slow_phases_and_the_step_after_them_have_an_allowance():
    watchdog = Watchdog(10.0, allowance_s=100.0, clock=Clock())

    def allowed(*phases: Phase) -> list[float]:
        found = []
        for phase in phases:
            watchdog.enter(phase)
            found.append(watchdog.standing()[2])
        return found

    assert allowed("start", "data", "d", "g") == [110.0] * 4  # the first step compiles and fills caches
    watchdog.end_step()
    assert allowed("data", "d", "g", "log") == [10.0] * 4
    for slow in ("sampling", "checkpoint"):
        # Rank 0 draws the grid; the others wait for it in their next step.
        assert allowed(slow, "data", "d", "g") == [110.0] * 4
        watchdog.end_step()
        assert allowed("data", "d", "g") == [10.0] * 3
    assert allowed("end") == [110.0]


def test_each_phase_starts_the_time_anew():
    clock = Clock()
    watchdog = Watchdog(10.0, clock=clock)
    clock.now = 9.0
    assert watchdog.standing() == ("start", 9.0, 10.0)
    watchdog.enter("data")
    clock.now = 18.0
    assert watchdog.standing() == ("data", 9.0, 10.0)


def test_null_switches_the_watchdog_off():
    with Watchdog(None, clock=Clock()) as watchdog:
        assert watchdog.standing()[2] == float("inf")
        assert watchdog._thread is None


def start_group(arguments: Sequence[str], log: Path) -> list[int]:
    """Two ranks from their start to the end of both, a stopped one being killed when the other is gone.

    Returns:
        Their exit codes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    with log.open("a") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                cwd=ROOT,
                env=environment({**address, "RANK": str(rank)}),
                stdout=output,
                stderr=output,
            )
            for rank in range(2)
        ]
        deadline = time.monotonic() + 180
        try:
            while any(rank.poll() is None for rank in ranks):
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                left = [psutil.Process(rank.pid) for rank in ranks if rank.poll() is None]
                if len(left) == 1 and left[0].status() == psutil.STATUS_STOPPED:
                    left[0].kill()
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return [rank.returncode for rank in ranks]


@pytest.mark.slow
@pytest.mark.multirank
def test_a_group_whose_rank_hangs_ends_and_reaches_the_weights_of_a_straight_run_when_started_anew(tiny, tmp_path):
    more = ("engine.backend=torch", "scaling.world_size=2", "scaling.watchdog_s=3", "scaling.timeout_s=120")
    command, log = [str(tmp_path), *tiny, *more, "checkpoint.save_interval_steps=4"], tmp_path / "log"
    # Two starts end in a hang, the third is the last; more are there in case the machine stands still itself.
    codes: list[list[int]] = []
    while codes[-1:] != [[0, 0]]:
        assert len(codes) < 6, log.read_text()[-3000:]
        codes.append(start_group(command, log))
    assert [EXIT_CODE, -signal.SIGKILL] in codes, codes
    waiting, sleeping = ((tmp_path / "hung" / f"watchdog-rank-{rank}.txt").read_text() for rank in (0, 1))
    # The stopped rank may or may not have done its part of D's reduction: the other waits for that one or for G's.
    at_reduction = r"in (finish|all_reduce)\b"
    for text, place in ((waiting, at_reduction), (sleeping, "in oversleep"), (log.read_text(), "in oversleep")):
        assert "has made no progress in phase g for 3." in text
        assert "3 s are allowed (" in text
        assert re.search(place, text)
    assert "resuming from" in log.read_text()
    assert_same_state(state_of(tmp_path / "hung", 10), state_of(tmp_path / "straight", 10))
