"""The end that training touches, without an uploader process: what it spools, says, and never does."""

import logging
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from tests.trainer.tracking.helpers import opened as helper
from trainer.config.sections import TrackingConfig
from trainer.tracking.spool import Progress, Status, read_records, save_progress, spool_path
from trainer.tracking.tracker import NullTracker, SpoolTracker, Tracker, UploaderProcess, open_tracker

URI = "http://user:secret@127.0.0.1:1"


class NoProcess(UploaderProcess):
    """An uploader process that is none: it counts its starts, and is dead if `alive` says so."""

    def __init__(self, run_directory: Path, backend: str, uri: str, timeout_s: float, *, alive: bool = True):
        super().__init__(run_directory, backend, uri, timeout_s)
        self.alive = alive
        self.starts = 0
        self.waits: list[float] = []

    def start(self) -> None:
        self.starts += 1

    def keep_alive(self) -> None:
        if not self.alive:
            self.start()

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        return False


opened = partial(helper.opened, uploader=NoProcess, flush_timeout_s=1)


def process_of(tracker: Tracker) -> NoProcess:
    assert isinstance(tracker, SpoolTracker)
    (uploader,) = tracker._uploaders
    assert isinstance(uploader, NoProcess)
    return uploader


def kinds(run: Path) -> list[str]:
    return [record.kind for record in read_records(spool_path(run))]


def test_logging_makes_no_connection_and_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("training waited or went to the network")

    for name in ("connect", "connect_ex", "send", "sendall", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(time, "sleep", forbidden)
    monkeypatch.setattr(subprocess.Popen, "wait", forbidden)
    run = opened(tmp_path, URI, watch_s=0)
    for step in range(1000):
        run.log_metrics(step, {"loss_g": 1.0, "loss_d": 2.0})
        run.log_image(step, "samples", tmp_path / "samples.png")
    assert kinds(tmp_path) == ["open", "artifact"] + ["metrics", "image"] * 1000


def test_close_says_what_is_left_and_how_to_send_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(tmp_path, URI)
    run.log_metrics(1, {"loss": 1.0})
    run.close("FINISHED")
    run.close("FINISHED")
    run.log_metrics(2, {"loss": 1.0})
    (warning,) = caplog.messages
    assert "4 records" in warning and "http://***@127.0.0.1:1" in warning
    assert f"python -m trainer.tracking deliver --run {tmp_path}" in warning


@pytest.mark.parametrize(("status", "waited_s"), [("FINISHED", 60.0), ("KILLED", 5.0)])
def test_end_of_a_stopped_run_does_not_use_its_grace_up_for_the_server(
    tmp_path: Path, status: Status, waited_s: float
) -> None:
    run = opened(tmp_path, URI, flush_timeout_s=60)
    run.close(status)
    assert process_of(run).waits == [pytest.approx(waited_s, abs=0.5)]  # less what went by since the end began


def test_password_is_in_no_file_and_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    opened(tmp_path, URI).close("KILLED")
    assert "secret" not in caplog.text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()


def test_config_is_a_file_of_the_run_and_a_changed_one_is_another(tmp_path: Path) -> None:
    opened(tmp_path, URI)
    opened(tmp_path, URI, last_step=10)
    opened(tmp_path, "http://other", last_step=20)
    artifacts = [record.payload["path"] for record in read_records(spool_path(tmp_path)) if record.kind == "artifact"]
    assert artifacts == ["tracking/config.yaml", "tracking/config-resumed-20.yaml"]
    assert "http://other" in (tmp_path / artifacts[1]).read_text()


@pytest.mark.parametrize(("watch_s", "starts"), [(3600, 1), (0, 11)])
def test_dead_uploader_process_is_started_again_but_not_at_every_step(
    tmp_path: Path, watch_s: float, starts: int
) -> None:
    run = opened(tmp_path, URI, watch_s=watch_s, uploader=partial(NoProcess, alive=False))
    for step in range(10):
        run.log_metrics(step, {"loss": 1.0})
    assert process_of(run).starts == starts


def test_uploader_process_that_died_is_started_again_and_one_that_lives_is_not(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    process = UploaderProcess(tmp_path, "mlflow", URI, 1, module=("-c", "input()"))  # no input: it dies at once
    process.start()
    first = process.pid
    assert process._process
    process._process.wait()
    process.keep_alive()
    assert process.pid != first
    process = UploaderProcess(tmp_path, "mlflow", URI, 1, module=("-c", "import signal; signal.pause()"))
    process.start()
    first = process.pid
    process.keep_alive()
    assert process.pid == first
    assert process._process
    process._process.kill()
    process._process.wait()


def test_uploader_process_can_print_anything_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tracking").mkdir()
    process = UploaderProcess(tmp_path, "mlflow", URI, 1, module=("-c", "print('\\U0001f3c3', end='')"))
    assert process.wait(60)
    assert (tmp_path / "tracking/mlflow/delivery.log").read_text(encoding="utf-8") == "\U0001f3c3"


def test_uploader_process_that_cannot_start_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fail)
    run = helper.opened(tmp_path, URI, flush_timeout_s=1)
    run.log_metrics(1, {"loss": 1.0})
    run.close("FINISHED")
    assert "no more processes" in caplog.text
    assert kinds(tmp_path)[-1] == "close"


def test_trouble_and_its_end_are_said_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = opened(tmp_path, URI, watch_s=0)
    target = "http://***@127.0.0.1:1"
    for step, trouble in enumerate([None, "refused", "refused", None, None]):
        save_progress(tmp_path, "mlflow", Progress(target=target, run_id="id", trouble=trouble))
        run.log_metrics(step, {"loss": 1.0})
    assert run.run_id == "id"
    assert [message.split(":")[-1].split(".")[0].strip() for message in caplog.messages] == ["refused", "1, is back"]


def test_run_directory_that_cannot_be_written_is_not_tracked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert isinstance(opened(tmp_path / "file", URI), NullTracker)
    assert "not tracked" in caplog.text


def test_run_without_trackers_leaves_no_trace(tmp_path: Path) -> None:
    run = open_tracker(
        TrackingConfig(backends=()), tmp_path, params={}, config_yaml="", tags={}, run_name="", last_step=None
    )
    run.log_metrics(1, {"loss": 1.0})
    run.log_image(1, "samples", tmp_path / "a.png")
    run.log_artifact(tmp_path / "a")
    run.close("FINISHED")
    assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_both_trackers_are_trackers(tmp_path: Path) -> None:
    assert isinstance(opened(tmp_path, URI), SpoolTracker)
    null: Tracker = NullTracker()
    assert null.run_id is None
