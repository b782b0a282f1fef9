"""What ends a run on Ray, and what does not: a killed driver or worker, starts that never get far, a damaged image."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from data.shards.index import load_index
from data.stream.partition import SampleOrder
from tests.data.damage import damage
from tests.launch import run_ranks, running, slow_steps, train_command, wait_for_checkpoint, wait_for_text
from tests.trainer.driver.hooked import hooked
from trainer.checkpoint.fingerprint import fingerprint
from trainer.checkpoint.format import list_checkpoints, newest_valid
from trainer.report.hours import read_hours
from trainer.timing.event_log import events_file, read_events

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TICK_S = 0.02
"""Of the clock that the start of a process is known by."""
RECORD_S = 1.0
"""Between two records of a process that has lived for less than 1000 s."""


def holder_of(directory: Path) -> int | None:
    """Process of rank 0, as the lease on a run names it."""
    try:
        return json.loads((directory / "lease.json").read_text())["pid"]
    except (OSError, ValueError):
        return None


def test_killed_driver_and_then_a_killed_worker_change_no_bit_and_all_hours_are_told(tiny, tmp_path):
    directory, log, straight = tmp_path / "run", tmp_path / "log.txt", tmp_path / "straight"
    more = ("training.total_images=960", "checkpoint.save_interval_steps=6", "scaling.world_size=2")
    arguments, slowly = train_command("digits", tiny, directory, *more), slow_steps(0.2)
    began = time.time()
    with running(arguments, log, slowly) as process:
        wait_for_checkpoint(directory, process, log)
        process.kill()  # it alone: nobody tells the workers, or the Ray that it started
        killed = time.time()
        process.wait()
    assert newest_valid(directory / "checkpoints")

    again = tmp_path / "again.txt"
    began_again = time.time()
    with running(arguments, again, slowly) as process:
        # Until then, the workers of the killed driver may still save.
        wait_for_text("resuming from", process, again)
        begun = newest_valid(directory / "checkpoints")
        assert begun
        wait_for_checkpoint(directory, process, again, after=begun.step)
        worker = holder_of(directory)
        assert worker
        os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=240) == 0, again.read_text()[-3000:]
    ended = time.time()
    assert again.read_text().count("resuming from") == 2

    hours = read_hours(directory)
    assert hours
    assert sum(hours.seconds.values()) == pytest.approx(hours.wall_s, abs=0.01)
    assert began - TICK_S <= hours.began <= hours.ended <= ended
    # The driver that was killed has left its log, and the second one lived while there was no rank 0.
    assert len({event.start for event in read_events(events_file(directory, "driver"))}) == 2
    assert hours.seconds["away"] <= began_again - killed + RECORD_S + TICK_S
    assert hours.seconds["restarts"] > 0
    assert [start.world_size for start in hours.starts] == [2, 2, 2]
    assert [start.status for start in hours.starts[1:]] == [None, "FINISHED"]
    assert hours.failures[-1].reason.startswith("failure 1 of the workers, after step")  # as the driver has it

    sets = [*tiny, *more, f"run.directory={straight}"]
    done = run_ranks(2, ["-m", "trainer.worker", "--config", "digits", *(x for o in sets for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [list_checkpoints(folder / "checkpoints")[-1] for folder in (directory, straight)]
    assert [end.step for end in ends] == [60, 60]
    assert fingerprint(ends[0]) == fingerprint(ends[1])


def test_start_that_fails_three_times_at_one_place_ends_the_run(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    more = ("scaling.world_size=1", "scaling.max_failures=10")
    with (
        hooked() as hook,
        running(train_command("digits", tiny, directory, *more, f"tracking.notify={hook.address}"), log) as process,
    ):
        killed: set[int] = set()
        deadline = time.monotonic() + 240
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            worker = holder_of(directory)
            if worker and worker != process.pid and worker not in killed:  # the driver looks at the lease as well
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
            time.sleep(0.02)
    text = log.read_text()
    assert process.returncode == 1, text[-3000:]
    assert len(killed) == 3
    assert "the workers failed 3 times before the first step of a start" in text
    assert "restarting in 2 s" in text  # before the third start
    assert hook.events == ["started", "restarted", "restarted", "failed"]
    assert (
        "failure 1 of the workers, before the first step of a start: the processes of the workers were killed" in text
    )
    assert text.splitlines()[-1] == "To resume from the last checkpoint, give the same command again."


def test_a_damaged_image_in_the_share_of_another_rank_ends_the_run_at_once(tiny, tiny_digits, tmp_path):
    data, log = tmp_path / "data", tmp_path / "log.txt"
    shutil.copytree(tiny_digits, data)
    index = load_index(data)
    order = SampleOrder([shard.num_samples for shard in index.shards], seed=0, window_shards=32)
    shards, samples = order.locate(8, 16)  # of the first batch, the half that is rank 1's
    (key,) = damage(index, (int(shards[0]), int(samples[0])))
    more = ("run.seed=0", "scaling.world_size=2", f"data.path={data}", "data.max_bad_percent=0")
    # Sizes are as they were, so nothing is seen before the image is read.
    arguments = train_command("digits", tiny, tmp_path / "run", *more, "data.verify=size")
    with running(arguments, log) as process:
        assert process.wait(timeout=120) == 2, log.read_text()[-3000:]
    text = log.read_text()
    assert f"00000.tar, key {key}" in text.splitlines()[-1]
    assert text.count("training on 2 ranks") == 1  # not tried again
