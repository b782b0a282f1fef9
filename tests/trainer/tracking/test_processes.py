"""The whole way to the trackers, with real processes and real servers: tracker, spool, uploader process, sink.

MLflow's file store appends a point each time it is sent, so it shows a doubled one; a database hides it. JSON lines and
a tracker that hangs stand for what is not MLflow.
"""

import base64
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

import mlflow
import pytest
from PIL import Image

from data.storage.redaction import redact
from tests.launch import ROOT
from tests.trainer.tracking.helpers.jsonl_sink import JsonLinesSink, read_lines
from tests.trainer.tracking.helpers.mlflow_stores import only_run, steps
from tests.trainer.tracking.helpers.opened import opened
from tests.trainer.tracking.helpers.waits import is_running, wait_for
from trainer.tracking.command import main
from trainer.tracking.spool import RunRecords, load_progress, spool_path
from trainer.tracking.tensorboard_sink import read_events
from trainer.tracking.tracker import SpoolTracker, UploaderProcess


def replay(run: Path, *arguments: str) -> None:
    """The command that the warning names, as a user types it."""
    command = [sys.executable, "-m", "trainer.tracking", "deliver", "--run", str(run), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class HangingServer:
    """Accepts connections and never answers."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self.connections.append(self._listener.accept()[0])

    def die(self) -> None:
        """Reset what is open, and refuse what comes."""
        with suppress(OSError):  # the second time
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def hanging_server() -> Iterator[HangingServer]:
    server = HangingServer()
    yield server
    server.die()


def test_training_process_does_not_import_mlflow() -> None:
    code = "import sys, trainer.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_hanging_server_costs_the_flush_timeout_and_no_point(
    hanging_server: HangingServer, database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    tracked = opened(run, f"http://user:secret@127.0.0.1:{hanging_server.port}", flush_timeout_s=1)
    wait_for(lambda: bool(hanging_server.connections))
    for step in range(1000):
        tracked.log_metrics(step, {"loss": 1.0})
    began = time.monotonic()
    tracked.close("FINISHED")
    assert time.monotonic() - began < 5  # flush_timeout_s and slack for a busy machine
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "1003 records" in warning and f"--run {run}" in warning
    for file in run.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file
    hanging_server.die()  # in the middle of a request
    replay(run, "--uri", database)  # it waits for the first uploader to give up
    assert steps(database) == list(range(1000))
    assert only_run(database).info.status == "FINISHED"


def behind_proxy(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """A server as a proxy shows it: below a path of its own, and with basic authentication."""
    allowed = "Basic " + base64.b64encode(b"ann:pa55w0rd").decode()

    def answer(environment: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        if environment.get("HTTP_AUTHORIZATION") != allowed:
            start("401 Unauthorized", [("WWW-Authenticate", "Basic")])
            return [b"401"]
        if not environment["PATH_INFO"].startswith("/team/mlflow/"):
            start("404 Not Found", [])
            return [b"404"]
        return app(environment | {"PATH_INFO": environment["PATH_INFO"].removeprefix("/team/mlflow")}, start)

    return answer


@pytest.mark.slow
def test_server_that_refuses_behind_a_proxy_with_a_password_gets_everything_when_it_is_back(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(empty_database, tmp_path / "server.db")
    monkeypatch.chdir(tmp_path)  # the server makes a default database in the current folder
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri, run = f"http://ann:pa55w0rd@127.0.0.1:{port}/team/mlflow", tmp_path / "run"
    tracked = opened(run, uri)
    tracked.log_metrics(0, {"loss": float("nan")})
    snapshot = run / "snapshots" / "step-00000300"
    snapshot.mkdir(parents=True)
    (snapshot / "generator.safetensors").write_text("weights")
    tracked.log_artifact(snapshot / "generator.safetensors", "snapshot", "digits")
    from mlflow.server import app, constants  # takes a second or two, while the uploader starts

    monkeypatch.setenv(constants.BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv(constants.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    monkeypatch.setenv(constants.ARTIFACTS_DESTINATION_ENV_VAR, str(tmp_path / "kept"))
    monkeypatch.setenv(constants.SERVE_ARTIFACTS_ENV_VAR, "true")
    wait_for(lambda: "ConnectionError" in (run / "tracking/mlflow/delivery.log").read_text())
    server = make_server("127.0.0.1", port, behind_proxy(app))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for step in range(1, 300):
            tracked.log_metrics(step, {"loss": 1.0})
        # The end waits some seconds for a server that is down, and the pauses between attempts have grown.
        shown = redact(uri)
        wait_for(lambda: load_progress(run, "mlflow", shown).offset == spool_path(run).stat().st_size, timeout_s=120)
        Image.new("RGB", (8, 8)).save(run / "grid.png")
        tracked.log_image(299, "samples", run / "grid.png")
        tracked.log_artifact(run / "grid.png", "snapshots")
        tracked.close("KILLED")
        assert steps(uri) == list(range(300))
        ended = only_run(uri)
        assert ended.info.run_id == tracked.run_id
        assert ended.info.status == "KILLED"
        assert ended.data.params == {"training.r1_gamma": "0.05", "tracking.uri": shown}
        assert ended.data.tags["index_sha256"] == "digest"
        client = mlflow.MlflowClient(uri)
        (version,) = client.search_model_versions("name='digits'")
        assert (version.run_id, version.status) == (tracked.run_id, "READY")
        assert version.source == f"{ended.info.artifact_uri}/model-step-00000300"
        assert {file.path for file in client.list_artifacts(ended.info.run_id)} == {
            "config.yaml",
            "images",
            "model-step-00000300",
            "snapshot",
            "snapshots",
        }
        assert len(client.list_artifacts(ended.info.run_id, "images")) == 2
    finally:
        server.shutdown()


@pytest.mark.slow
def test_run_killed_and_resumed_is_one_run_without_gap_or_double(tmp_path: Path) -> None:
    run, uri = tmp_path / "run", f"file://{tmp_path}/store"
    killed = f"""
import os, signal, time
from pathlib import Path
from tests.trainer.tracking.helpers.opened import opened
tracked = opened(Path({str(run)!r}), {uri!r})
for step in range(10, 131, 10):
    tracked.log_metrics(step, {{"loss": 1.0}})
print(tracked._uploaders[0].pid, flush=True)
while tracked.run_id is None:
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not is_running(int(done.stdout)))
    assert steps(uri) == list(range(10, 131, 10))
    assert only_run(uri).info.status == "FAILED"
    resumed = opened(run, uri, last_step=100)
    for step in range(110, 201, 10):
        resumed.log_metrics(step, {"loss": 1.0})
    resumed.close("FINISHED")
    assert steps(uri) == list(range(10, 201, 10))
    assert only_run(uri).info.status == "FINISHED"


def opened_jsonl(folder: Path, watch_s: float = 30, **options: Any) -> SpoolTracker:
    """A run that is reported to `folder/lines`."""
    process = partial(UploaderProcess, module=("-m", "tests.trainer.tracking.helpers.jsonl_sink"))
    options = {"backends": ("jsonl",), "uploader": process, "watch_s": watch_s} | options
    tracked = opened(folder / "run", f"file://{folder}/lines", **options)
    assert isinstance(tracked, SpoolTracker)
    return tracked


def test_second_tracker_is_one_file_with_a_sink(tmp_path: Path) -> None:
    tracked = opened_jsonl(tmp_path)
    (tmp_path / "run/grid.png").touch()
    tracked.log_metrics(10, {"loss": 1.0, "rate": 2.0})
    tracked.log_image(10, "samples", tmp_path / "run/grid.png")
    tracked.log_artifact(tmp_path / "run/grid.png", "snapshot")
    tracked.close("FINISHED")
    uid = RunRecords(spool_path(tmp_path / "run")).uid
    created, *lines = read_lines(tmp_path / "lines")
    assert created == {"call": "create", "run": uid, "name": "name"}
    calls = [line["call"] for line in lines if line["call"] != "status"]
    assert calls == ["describe", "artifact", "point", "point", "image", "artifact"]
    assert {"call": "point", "run": uid, "key": "rate", "step": 10, "value": 2.0} in lines
    assert {"call": "image", "key": "samples", "step": 10, "file": "grid.png"} in lines
    assert {"call": "artifact", "folder": "snapshot", "file": "grid.png"} in lines
    assert lines[-1] == {"call": "status", "status": "FINISHED"}


@pytest.mark.slow
def test_tracker_that_hangs_delays_no_other_and_gets_everything_later(tmp_path: Path, caplog) -> None:
    tracked = opened_jsonl(tmp_path, backends=("hanging", "tensorboard", "jsonl"), flush_timeout_s=3)
    for step in (10, 20):
        tracked.log_metrics(step, {"loss": 1.0})
    began = time.monotonic()
    tracked.close("FINISHED")
    assert time.monotonic() - began < 6
    assert read_lines(tmp_path / "lines")[-1] == {"call": "status", "status": "FINISHED"}
    events = [event for file in tmp_path.rglob("*tfevents*") for event, _ in read_events(file)]
    assert [event.step for event in events for value in event.summary.value if value.tag == "loss"] == [10, 20]
    (warning,) = caplog.messages
    assert "5 records of the run are not at" in warning
    hanging = tracked._uploaders[0].pid
    assert hanging
    os.kill(hanging, signal.SIGKILL)
    (tmp_path / "lines").unlink()
    again = ["deliver", "--run", str(tmp_path / "run"), "--backend", "hanging"]
    assert main(again, sinks={"hanging": JsonLinesSink}) == 0
    sent = read_lines(tmp_path / "lines")
    assert [line["step"] for line in sent if line["call"] == "point"] == [10, 20]


@pytest.mark.slow
def test_uploader_process_killed_at_random_doubles_and_loses_nothing(tmp_path: Path) -> None:
    tracked = opened_jsonl(tmp_path, watch_s=0)
    lines, draw, next_step = tmp_path / "lines", random.Random(0), 0
    for _ in range(4):
        before = lines.stat().st_size if lines.exists() else 0
        for _ in range(1500):
            tracked.log_metrics(next_step, {"loss": 1.0, "rate": 2.0})
            next_step += 1
        size = before + draw.randrange(1, 100_000)  # of about 150,000 bytes that are to come
        wait_for(lambda size=size: lines.exists() and lines.stat().st_size >= size, poll_s=0.001)
        pid = tracked._uploaders[0].pid
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
