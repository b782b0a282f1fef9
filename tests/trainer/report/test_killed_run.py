"""A real run that is killed and resumed: its hours add up to the time on a watch, and lost work is what is redone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import environment, slow_steps
from trainer.checkpoint.format import list_checkpoints
from trainer.report.hours import read_hours
from trainer.timing.event_log import events_file, read_events

pytestmark = pytest.mark.slow

PAUSE_S = 3.0


def start(tiny: tuple[str, ...], directory: Path) -> subprocess.Popen[bytes]:
    settings = (*tiny, f"run.directory={directory}", "engine.backend=torch", "training.total_images=560")
    settings = (*settings, "checkpoint.save_interval_steps=10", "tracking.log_interval_steps=50")
    command = [sys.executable, "-m", "trainer.worker", "--config", "digits"]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(command, env=environment() | slow_steps(0.15), stderr=subprocess.PIPE)


def wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def step_of(directory: Path) -> int:
    events = read_events(events_file(directory, "rank-0"))
    return max((event.fields.get("step") or 0 for event in events), default=0)


def test_hours_of_a_killed_run_add_up_and_lost_work_is_what_the_resumed_run_does_again(tiny, tmp_path: Path) -> None:
    began = time.time()
    first = start(tiny, tmp_path)
    wait(lambda: step_of(tmp_path) >= 16, first)
    os.kill(first.pid, signal.SIGKILL)
    killed_at = time.time()
    first.communicate()
    reached, resumes_from = step_of(tmp_path), max(found.step for found in list_checkpoints(tmp_path / "checkpoints"))
    time.sleep(PAUSE_S)
    started_again = time.time()
    second = start(tiny, tmp_path)
    assert second.wait(120) == 0, second.communicate()[1]
    ended = time.time()

    hours = read_hours(tmp_path)
    assert hours
    assert sum(hours.seconds.values()) == pytest.approx(hours.wall_s, abs=0.01)
    # A process starts within 0.5 s, and its start time is known to 0.01 s. Its last record is at most a second old.
    assert began - 0.02 <= hours.began <= began + 0.5
    assert ended - 3 <= hours.ended <= ended
    assert started_again - killed_at - 0.02 <= hours.seconds["away"] <= started_again - killed_at + 1.5
    assert [start.first_step for start in hours.starts] == [0, resumes_from]
    assert hours.lost_steps == reached - resumes_from
    assert 0.15 * hours.lost_steps <= hours.seconds["lost"] <= killed_at - began - hours.seconds["start"]
    assert hours.steps == 35 - 2  # without the first step of each start
    assert hours.seconds["computing"] >= 0.15 * hours.steps - 0.5
    assert [failure.step for failure in hours.failures] == [reached]
    assert json.dumps(hours.starts[0].facts["tags"])
