"""A tracker that is not MLflow, through the whole path: tracker, spool, uploader process, sink."""

import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.trainer.tracking.helpers.jsonl_sink import read_lines
from tests.trainer.tracking.helpers.waits import is_running, wait_for
from tests.trainer.tracking.opened import opened
from trainer.tracking.tracker import SpoolTracker, Tracker, UploaderProcess


def opened_jsonl(folder: Path, watch_s: float = 30) -> Tracker:
    """A run that is reported to `folder/lines`."""
    process = partial(UploaderProcess, module=("-m", "tests.trainer.tracking.helpers.jsonl_sink"))
    return opened(folder / "run", f"file://{folder}/lines", backend="jsonl", uploader=process, watch_s=watch_s)


def test_second_tracker_is_one_file_with_a_sink(tmp_path: Path) -> None:
    tracked = opened_jsonl(tmp_path)
    (tmp_path / "run/grid.png").touch()
    tracked.log_metrics(10, {"loss": 1.0, "rate": 2.0})
    tracked.log_image(10, "samples", tmp_path / "run/grid.png")
    tracked.log_artifact(tmp_path / "run/grid.png", "snapshot")
    tracked.close("FINISHED")
    created, *lines = read_lines(tmp_path / "lines")
    assert created == {"call": "create", "run": tracked.run_id, "name": "name"}
    calls = [line["call"] for line in lines if line["call"] != "status"]
    assert calls == ["describe", "artifact", "point", "point", "image", "artifact"]
    assert {"call": "point", "run": tracked.run_id, "key": "rate", "step": 10, "value": 2.0} in lines
    assert {"call": "image", "key": "samples", "step": 10, "file": "grid.png"} in lines
    assert {"call": "artifact", "folder": "snapshot", "file": "grid.png"} in lines
    assert lines[-1] == {"call": "status", "status": "FINISHED"}


@pytest.mark.slow
def test_uploader_process_killed_at_random_doubles_and_loses_nothing(tmp_path: Path) -> None:
    tracked = opened_jsonl(tmp_path, watch_s=0)
    assert isinstance(tracked, SpoolTracker)
    lines, draw, next_step = tmp_path / "lines", random.Random(0), 0
    for _ in range(4):
        before = lines.stat().st_size if lines.exists() else 0
        for _ in range(1500):
            tracked.log_metrics(next_step, {"loss": 1.0, "rate": 2.0})
            next_step += 1
        size = before + draw.randrange(1, 100_000)  # of about 150,000 bytes that are to come
        wait_for(lambda size=size: lines.exists() and lines.stat().st_size >= size, poll_s=0.001)
        pid = tracked._uploader.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not is_running(pid))
    tracked.close("FINISHED")
    sent = read_lines(lines)
    for key in ("loss", "rate"):
        assert [line["step"] for line in sent if line["call"] == "point" and line["key"] == key] == list(
            range(next_step)
        )
    assert sum(line["call"] == "create" for line in sent) == 1
    assert sent[-1] == {"call": "status", "status": "FINISHED"}
