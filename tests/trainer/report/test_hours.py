"""The account of a run's time: every second has one place, and what a failure undid is told from pauses and waits."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.report.made import HOUR, Clock, Life
from trainer.report.hours import CATEGORIES, read_hours
from trainer.timing.event_log import events_file


def account(directory: Path) -> dict[str, Any]:
    """The seconds of a run by category, without zeros; they must add up to its time."""
    hours = read_hours(directory)
    assert hours
    assert hours.seconds.keys() == CATEGORIES.keys()
    assert sum(hours.seconds.values()) == pytest.approx(hours.wall_s, abs=1e-3)  # records are rounded to 0.1 ms
    return {name: pytest.approx(seconds, abs=0.01) for name, seconds in hours.seconds.items() if seconds > 0.005}


def uninterrupted(directory: Path, clock: Clock, status: str = "FINISHED") -> None:
    life = Life(directory, clock)
    life.resume(0, 20)
    life.steps(1, 11, g=2, data=1)
    life.spend("sampling", 7)
    life.spend("checkpoint", 5)
    life.steps(12, 21, g=2, data=1)
    life.spend("end", 4)
    life.sheet.close(status=status)


def test_each_phase_has_its_place_and_the_first_step_is_part_of_the_start(tmp_path: Path) -> None:
    uninterrupted(tmp_path, Clock())
    assert account(tmp_path) == {
        "start": 23,
        "computing": 40,
        "data": 20,
        "evaluation": 7,
        "checkpoints": 5,
        "closing": 4,
    }
    hours = read_hours(tmp_path)
    assert hours
    assert (hours.steps, hours.step_s, hours.lost_steps, hours.failures) == (20, pytest.approx(3), 0, ())
    assert (hours.saves, hours.save_s) == (1, pytest.approx(5))
    assert hours.rank_seconds == pytest.approx(2 * 99)
    assert hours.gpu_seconds == 0
    assert hours.goodput == pytest.approx(40 / 99)


def test_work_after_the_checkpoint_of_a_killed_start_is_lost_and_the_pause_is_told_apart(tmp_path: Path) -> None:
    clock = Clock()
    first = Life(tmp_path, clock)
    first.resume(0, 10)
    first.steps(1, 11, g=2)
    first.spend("checkpoint", 3)
    first.steps(12, 16, g=2)
    first.die()
    clock.now += HOUR
    second = Life(tmp_path, clock)
    second.resume(11, 8)
    second.steps(12, 21, g=2)
    second.sheet.close(status="FINISHED")
    lost, pause = 5 * 2, HOUR
    assert account(tmp_path) == {
        "start": 12,
        "computing": 20 + 18,
        "checkpoints": 3,
        "lost": lost,
        "away": pause,
        "restarts": 8 + 2,
    }
    hours = read_hours(tmp_path)
    assert hours
    assert hours.lost_steps == 5
    assert [(failure.step, failure.reason) for failure in hours.failures] == [
        (16, "it was killed, or its machine was lost")
    ]
    assert hours.held_s == pytest.approx(hours.wall_s - HOUR)


def test_waiting_for_nodes_under_a_living_driver_is_neither_a_pause_nor_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    driver = Life(tmp_path, clock, "driver")
    clock.now += 30  # Ray starts
    driver.sheet.enter("ranks")
    first = Life(tmp_path, clock, device="NVIDIA H200", world_size=8)
    first.resume(0, 10)
    first.steps(1, 4, g=2)
    first.die()
    clock.now += 5
    driver.sheet.tell("restarted", reason="failure 1 of the workers: a host was lost")
    driver.sheet.enter("waiting")
    clock.now += 600
    driver.sheet.enter("ranks")
    clock.now += 7
    second = Life(tmp_path, clock, device="NVIDIA H200", world_size=8)
    second.resume(0, 10)
    second.steps(1, 4, g=2)
    second.sheet.close(status="FINISHED")
    clock.now += 3
    driver.sheet.close()
    # The first step of the lost start counts as its start.
    assert account(tmp_path) == {
        "start": 30 + 10 + 2,
        "lost": 6,
        "nodes": 600,
        "restarts": 5 + 7 + 10 + 2,
        "computing": 6,
        "closing": 3,
    }
    hours = read_hours(tmp_path)
    assert hours
    assert [failure.reason for failure in hours.failures] == ["failure 1 of the workers: a host was lost"]
    assert hours.gpu_seconds == pytest.approx(8 * (hours.wall_s - 600))


def test_going_back_within_a_process_loses_work_but_is_no_failure(tmp_path: Path) -> None:
    clock = Clock()
    life = Life(tmp_path, clock)
    life.resume(0, 10)
    life.steps(1, 5, g=2)
    life.spend("checkpoint", 1)
    life.steps(6, 8, g=2)
    life.spend("start", 4)
    life.sheet.resume(5)
    life.steps(6, 10, g=2)
    life.sheet.close(status="FINISHED")
    assert account(tmp_path) == {"start": 12, "computing": 16, "checkpoints": 1, "lost": 6, "restarts": 4 + 2}
    hours = read_hours(tmp_path)
    assert hours
    assert (hours.lost_steps, hours.failures) == (3, ())


def test_a_stopped_machine_is_a_pause(tmp_path: Path) -> None:
    clock, wall = Clock(), Clock()
    life = Life(tmp_path, clock)
    life.sheet._wall_clock = wall
    wall.now += 10
    life.resume(0, 10)
    life.steps(1, 3, g=2)
    wall.now = clock.now + HOUR  # the clock of the process stands still in a suspended machine
    life.sheet.close(status="KILLED")
    assert account(tmp_path)["away"] == pytest.approx(HOUR)


def test_a_command_given_again_after_the_end_adds_nothing(tmp_path: Path) -> None:
    clock = Clock()
    uninterrupted(tmp_path, clock)
    before = read_hours(tmp_path)
    clock.now += HOUR
    again = Life(tmp_path, clock)
    again.resume(21, 5)
    again.sheet.close(status="FINISHED")
    assert read_hours(tmp_path) == before


def test_a_run_that_is_stopped_or_still_lives_has_not_failed_and_a_dead_one_has(tmp_path: Path) -> None:
    uninterrupted(tmp_path / "stopped", Clock(), "KILLED")
    uninterrupted(tmp_path / "error", Clock(), "FAILED")
    life = Life(tmp_path / "living", Clock())
    life.resume(0, 5)
    life.steps(1, 9, g=1)
    life.die()
    failures = {name: read_hours(tmp_path / name) for name in ("stopped", "error", "living")}
    assert {name: len(hours.failures) for name, hours in failures.items() if hours} == {
        "stopped": 0,
        "error": 1,
        "living": 1,
    }
    alive = read_hours(tmp_path / "living", running=True)
    assert alive
    assert alive.failures == ()


def test_two_overlapping_processes_are_not_counted_twice(tmp_path: Path) -> None:
    clock = Clock()
    uninterrupted(tmp_path, clock, "KILLED")
    clock.now -= 10
    uninterrupted(tmp_path, clock)
    assert account(tmp_path)


def test_torn_and_foreign_lines_change_nothing(tmp_path: Path) -> None:
    uninterrupted(tmp_path, Clock())
    before = read_hours(tmp_path)
    file = events_file(tmp_path, "rank-0")
    lines = file.read_bytes().splitlines(keepends=True)
    odd = b'{"kind": "phase", "at": 1, "start": "x", "seconds": [1], "step": "a"}\nnull\n'
    file.write_bytes(lines[0] + odd + b"".join(lines[1:]) + lines[-1][:40])
    assert read_hours(tmp_path) == before


def test_a_run_without_a_log_has_no_account(tmp_path: Path) -> None:
    assert read_hours(tmp_path) is None
