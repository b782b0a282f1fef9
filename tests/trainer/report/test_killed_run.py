"""A real run that is killed and resumed: its hours add up to the time on a watch, and lost work is what is redone."""

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

PAUSE_S, SLOW_STEP_S = 3.0, 0.15


def start(tiny: tuple[str, ...], directory: Path) -> subprocess.Popen[bytes]:
    settings = (*tiny, f"run.directory={directory}", "engine.backend=torch", "training.total_images=560")
    settings = (*settings, "checkpoint.save_interval_steps=10", "tracking.log_interval_steps=50")
    command = [sys.executable, "-m", "trainer.worker", "--config", "digits"]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(command, env=environment() | slow_steps(SLOW_STEP_S), stderr=subprocess.PIPE)


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
    first_started = time.time()
    wait(lambda: step_of(tmp_path) >= 16, first)
    os.kill(first.pid, signal.SIGKILL)
    killed = time.time()
    first.communicate()
    *_, last_sign = read_events(events_file(tmp_path, "rank-0"))
    reached, resumes_from = step_of(tmp_path), max(found.step for found in list_checkpoints(tmp_path / "checkpoints"))
    time.sleep(PAUSE_S)
    began_again = time.time()
    second = start(tiny, tmp_path)
    second_started = time.time()
    assert second.wait(120) == 0, second.communicate()[1]
    ended, last_save = time.time(), tmp_path / "checkpoints/step-00000035/manifest.json"

    hours = read_hours(tmp_path)
    assert hours
    assert sum(hours.seconds.values()) == pytest.approx(hours.wall_s, abs=0.01)
    tick_s = 0.02  # of the clock that the start of a process is known by
    assert began - tick_s <= hours.began <= first_started + tick_s
    assert last_save.stat().st_mtime <= hours.ended <= ended
    assert began_again - killed - tick_s <= hours.seconds["away"] <= second_started - last_sign.at + tick_s
    assert [start.first_step for start in hours.starts] == [0, resumes_from]
    assert hours.lost_steps == reached - resumes_from
    assert SLOW_STEP_S * hours.lost_steps <= hours.seconds["lost"] <= killed - began - hours.seconds["start"]
    assert hours.steps == 35 - 2  # without the first step of each start
    assert hours.seconds["computing"] >= SLOW_STEP_S * hours.steps - 0.5
    assert [failure.step for failure in hours.failures] == [reached]
