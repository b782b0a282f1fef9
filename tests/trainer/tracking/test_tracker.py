"""The end that training touches, without a delivery process: what it spools, says, and never does."""

import logging
import socket
import subprocess
import time
from pathlib import Path

import pytest

from trainer.config.sections import TrackingConfig
from trainer.tracking import tracker
from trainer.tracking import tracker as courier
from trainer.tracking.spool import Delivered, Status, read_records, save_delivered, spool_path
from trainer.tracking.tracker import MlflowTracker, NullTracker, Tracker, open_tracker


class Child:
    """Stands for the delivery process."""

    started = 0

    def __init__(self, *arguments: object, **options: object):
        type(self).started += 1
        self.pid = 1
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        raise subprocess.TimeoutExpired("deliver", timeout)


@pytest.fixture(autouse=True)
def child(monkeypatch: pytest.MonkeyPatch) -> type[Child]:
    monkeypatch.setattr(courier.subprocess, "Popen", Child)
    Child.started = 0
    return Child


def opened(run: Path, *, uri: str = "http://user:secret@127.0.0.1:1", last_step: int | None = None) -> Tracker:
    return open_tracker(
        TrackingConfig(uri=uri, flush_timeout_s=1),
        run,
        params={"training.r1_gamma": 0.05, "tracking.uri": uri},
        config_yaml=f"tracking:\n  uri: {uri}\n",
        tags={"index_sha256": "digest"},
        run_name="name",
        last_step=last_step,
    )


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
    monkeypatch.setattr(Child, "wait", forbidden)
    monkeypatch.setattr(tracker, "WATCH_S", 0.0)
    run = opened(tmp_path)
    for step in range(1000):
        run.log_metrics(step, {"loss_g": 1.0, "loss_d": 2.0})
        run.log_image(step, "samples", tmp_path / "samples.png")
    assert kinds(tmp_path) == ["open", "artifact"] + ["metrics", "image"] * 1000


def test_close_says_what_is_left_and_how_to_send_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(tmp_path)
    run.log_metrics(1, {"loss": 1.0})
    run.close("FINISHED")
    run.close("FINISHED")
    run.log_metrics(2, {"loss": 1.0})
    (warning,) = caplog.messages
    assert "4 records" in warning and "http://***@127.0.0.1:1" in warning
    assert f"python -m trainer.tracking deliver --run {tmp_path}" in warning


@pytest.mark.parametrize(("status", "waited_s"), [("FINISHED", 60.0), ("KILLED", 5.0)])
def test_end_of_a_stopped_run_does_not_use_its_grace_up_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status, waited_s: float
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(courier.Courier, "wait", lambda self, timeout_s: bool(waits.append(timeout_s)))
    config = TrackingConfig(uri="http://127.0.0.1:1", flush_timeout_s=60)
    run = open_tracker(config, tmp_path, params={}, config_yaml="", tags={}, run_name="name", last_step=None)
    run.close(status)
    assert waits == [waited_s]


def test_password_is_in_no_file_and_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    opened(tmp_path).close("KILLED")
    assert "secret" not in caplog.text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()


def test_config_is_a_file_of_the_run_and_a_changed_one_is_another(tmp_path: Path) -> None:
    opened(tmp_path)
    opened(tmp_path, last_step=10)
    opened(tmp_path, uri="http://other", last_step=20)
    artifacts = [record.payload["path"] for record in read_records(spool_path(tmp_path)) if record.kind == "artifact"]
    assert artifacts == ["tracking/config.yaml", "tracking/config-resumed-20.yaml"]
    assert "http://other" in (tmp_path / artifacts[1]).read_text()


def test_dead_delivery_process_is_started_again_but_not_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: type[Child]
) -> None:
    monkeypatch.setattr(tracker, "WATCH_S", 0.0)
    monkeypatch.setattr(child, "poll", lambda self: -9)
    run = opened(tmp_path)
    for step in range(10):
        run.log_metrics(step, {"loss": 1.0})
    assert child.started == 1
    monkeypatch.setattr(courier, "RESTART_S", 0.0)
    run.log_metrics(10, {"loss": 1.0})
    assert child.started == 2


def test_delivery_process_that_cannot_start_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(courier.subprocess, "Popen", fail)
    run = opened(tmp_path)
    run.log_metrics(1, {"loss": 1.0})
    run.close("FINISHED")
    assert "no more processes" in caplog.text
    assert kinds(tmp_path)[-1] == "close"


def test_trouble_and_its_end_are_said_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracker, "WATCH_S", 0.0)
    run = opened(tmp_path)
    target = "http://***@127.0.0.1:1"
    for step, trouble in enumerate([None, "refused", "refused", None, None]):
        save_delivered(tmp_path, Delivered(target=target, run_id="id", trouble=trouble))
        run.log_metrics(step, {"loss": 1.0})
    assert run.run_id == "id"
    assert [message.split(":")[-1].split(".")[0].strip() for message in caplog.messages] == ["refused", "1 is back"]


def test_run_directory_that_cannot_be_written_is_not_tracked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert isinstance(opened(tmp_path / "file"), NullTracker)
    assert "not tracked" in caplog.text


def test_backend_none_leaves_no_trace(tmp_path: Path) -> None:
    run = open_tracker(
        TrackingConfig(backend="none"), tmp_path, params={}, config_yaml="", tags={}, run_name="", last_step=None
    )
    run.log_metrics(1, {"loss": 1.0})
    run.log_image(1, "samples", tmp_path / "a.png")
    run.log_artifact(tmp_path / "a")
    run.close("FINISHED")
    assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_both_trackers_are_trackers(tmp_path: Path) -> None:
    assert isinstance(opened(tmp_path), MlflowTracker)
    null: Tracker = NullTracker()
    assert null.run_id is None
