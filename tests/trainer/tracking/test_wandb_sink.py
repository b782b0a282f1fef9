"""Weights & Biases: against a stand-in that fails on command, and its own library in offline mode."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.tracking.helpers.opened import opened
from tests.trainer.tracking.helpers.waits import Clock, wait_for
from tests.trainer.tracking.helpers.wandb_stand_in import Library, Server
from trainer.tracking.spool import RunRecords, Spool, Status, load_progress, spool_path
from trainer.tracking.tracker import SpoolTracker
from trainer.tracking.uploader import Uploader
from trainer.tracking.wandb_sink import WandbSink, read_rows


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def report(run: Path, steps: range, last_step: int | None = None, status: Status | None = "FINISHED") -> None:
    """What one start of a run reports; no status: it died."""
    spool = Spool(run, last_step=last_step)
    spool.open(step=last_step, params={"a": "1"}, tags={"git_commit": "c0ffee"})
    Image.new("RGB", (3, 2)).save(run / "grid.png")
    for step in steps:
        spool.metrics(step, {"loss": step, "rate": 1})
        if step == 30:
            spool.image(step, "samples", run / "grid.png")
            spool.artifact(run / "grid.png", "snapshot")
    if status:
        spool.close(status)


def nothing(call: str) -> None: ...


def upload(
    run: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[str], None] = nothing,
    after: Callable[[str], None] = nothing,
) -> int:
    """What one uploader process does."""
    monkeypatch.setitem(sys.modules, "wandb", Library(server, before, after))
    sink, clock = WandbSink("", run), Clock()
    options = {"trainer_lives": lambda: False, "clock": clock, "sleep": clock.sleep}
    return Uploader(run, "wandb", sink, target="there", timeout_s=30, **options).run()


def at_call(number: int, error: BaseException) -> Callable[[str], None]:
    """A hook that raises at one call and never again."""
    calls = iter(range(10_000))

    def hook(name: str) -> None:
        if next(calls) == number:
            raise error

    return hook


def assert_complete(server: Server, steps: range) -> None:
    for key in ("loss", "rate"):
        assert sorted(server.points(key)) == list(steps)
    assert server.points("samples") == [30]
    assert {kind for _, kind in server.artifacts} == {"snapshot"}


def test_curves_grids_settings_files_and_status_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    report(tmp_path, range(10, 61, 10))
    assert upload(tmp_path, server, monkeypatch) == 0
    assert_complete(server, range(10, 61, 10))
    assert server.id == RunRecords(spool_path(tmp_path)).uid
    assert server.rows[1] == {"step": 20, "loss": 20.0, "rate": 1.0}
    assert server.config.values == {"a": "1", "tags": {"git_commit": "c0ffee"}}
    assert server.ends == [(0, False)] and server.summary == {"status": "FINISHED"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_every_point_arrives_once_whatever_call_the_process_is_killed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    killed = 0
    for number in range(14):
        run, server = tmp_path / str(number), Server()
        run.mkdir()
        report(run, range(10, 61, 10))
        try:
            upload(run, server, monkeypatch, **{moment: at_call(number, Killed())})
        except Killed:
            killed += 1
        assert upload(run, server, monkeypatch) == 0
        assert_complete(server, range(10, 61, 10))
    assert killed >= 9


def test_every_point_arrives_once_if_a_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(14):
        run, server = tmp_path / str(number), Server()
        run.mkdir()
        report(run, range(10, 61, 10))
        assert upload(run, server, monkeypatch, before=at_call(number, ConnectionError("away"))) == 0
        assert_complete(server, range(10, 61, 10))


def test_resumed_run_is_one_line_and_what_was_confirmed_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, calls = Server(), []
    report(tmp_path, range(10, 41, 10), status="KILLED")
    upload(tmp_path, server, monkeypatch)
    assert server.ends == [(1, True)] and server.summary == {"status": "KILLED"}
    report(tmp_path, range(30, 61, 10), last_step=20)
    assert upload(tmp_path, server, monkeypatch, before=calls.append) == 0
    assert_complete(server, range(10, 61, 10))
    assert calls.count("log") == 2
    assert server.ends == [(1, True), (0, False)]


def test_dead_run_is_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    report(tmp_path, range(10, 41, 10), status=None)
    assert upload(tmp_path, server, monkeypatch) == 0
    assert server.ends == [(1, False)] and server.summary == {"status": "FAILED"}


def test_server_that_is_away_keeps_its_records_in_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(call: str) -> None:
        raise ConnectionError("https://user:secret@host is away")

    report(tmp_path, range(10, 61, 10))
    server = Server()
    assert upload(tmp_path, server, monkeypatch, before=away) == 10
    assert "ConnectionError: https://***@host is away" in (load_progress(tmp_path, "wandb", "there").trouble or "")
    assert upload(tmp_path, server, monkeypatch) == 0
    assert_complete(server, range(10, 61, 10))


@pytest.mark.slow
def test_real_library_killed_offline_and_resumed_has_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    tracked = opened(run, None, backends=("wandb",), watch_s=0)
    assert isinstance(tracked, SpoolTracker)
    (uploader,) = tracked._uploaders
    Image.new("RGB", (3, 2)).save(run / "grid.png")
    for step in range(10, 101, 10):
        tracked.log_metrics(step, {"loss": step, "time/data_s": float("nan")})
    tracked.log_image(100, "samples", run / "grid.png")
    wait_for(lambda: load_progress(run, "wandb", uploader.shown_uri).offset == spool_path(run).stat().st_size)
    assert uploader.pid
    os.kill(uploader.pid, signal.SIGKILL)
    tracked.log_metrics(110, {"loss": 110})
    tracked.close("KILLED")
    resumed = opened(run, None, backends=("wandb",), last_step=100)
    resumed.log_metrics(120, {"loss": 120})
    resumed.log_artifact(run / "grid.png", "snapshot")
    resumed.close("FINISHED")
    rows = [row for file in (run / "tracking/wandb/wandb").glob("offline-run-*/run-*.wandb") for row in read_rows(file)]
    found = Counter((key, row["step"]) for row in rows for key in row if key in ("loss", "time/data_s"))
    assert found == Counter(
        [("loss", step) for step in range(10, 121, 10)] + [("time/data_s", step) for step in range(10, 101, 10)]
    )
    assert [row["step"] for row in rows if any(key.startswith("samples") for key in row)] == [100]
