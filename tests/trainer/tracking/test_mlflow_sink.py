"""MLflow itself: its stores in this process, and the whole way with real processes and real servers.

A file store appends a point each time it is sent, so it shows a doubled one; a database hides it.
"""

import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from wsgiref.simple_server import make_server

import mlflow
import pytest
from mlflow.entities import Run
from PIL import Image

from tests.launch import ROOT
from tests.trainer.tracking.opened import opened
from tests.trainer.tracking.waits import is_running, wait_for
from trainer.tracking.command import main
from trainer.tracking.mlflow_sink import MlflowSink, artifact_root
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record, Spool, load_progress, spool_path
from trainer.tracking.tracker import UploaderProcess
from trainer.tracking.uploader import Uploader


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "ENABLE_ASYNC_LOGGING"):
        monkeypatch.setenv(f"MLFLOW_{name}", "5")  # MlflowSink sets them; this restores them


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialized database: making one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    """URI of the default store of a run in `tmp_path / "run"`."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def opening(
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    *,
    step: int | None = None,
    run_id: str | None = None,
) -> Record:
    payload = {
        "uid": "our-uid",
        "run_id": run_id,
        "run_name": "name",
        "experiment": "my experiment",
        "params": params or {},
        "tags": tags or {},
    }
    return Record(kind="open", at=1_700_000_000_000, step=step, payload=payload, start=0, end=1)


def attached(uri: str, run: Path) -> tuple[MlflowSink, str]:
    sink = MlflowSink(uri, run)
    run_id, _ = sink.attach(opening(), None)
    return sink, run_id


def steps(uri: str, key: str = "loss") -> list[int]:
    """Steps of the only run's curve, in order of arrival; a doubled point shows twice."""
    client = mlflow.MlflowClient(uri)
    return [metric.step for metric in client.get_metric_history(only_run(uri).info.run_id, key)]


def only_run(uri: str) -> Run:
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


# In this process


def test_lost_answer_to_the_creation_makes_no_second_run(database: str, tmp_path: Path) -> None:
    first, created = MlflowSink(database, tmp_path / "run").attach(opening(), None)
    again, created_again = MlflowSink(database, tmp_path / "run").attach(opening(), None)
    assert (created, created_again) == (True, False)
    assert first == again == only_run(database).info.run_id


def test_run_id_from_a_checkpoint_finds_the_run_without_its_uid(database: str, tmp_path: Path) -> None:
    _, run_id = attached(database, tmp_path / "run")
    other = opening(run_id=run_id)
    other.payload["uid"] = "another-uid"
    assert MlflowSink(database, tmp_path / "run").attach(other, None) == (run_id, False)


def test_server_decides_where_its_artifacts_are_and_a_bare_database_keeps_them_near(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert artifact_root("https://host", run) is None
    assert artifact_root("file:///abs", run) is None
    assert artifact_root("postgresql+psycopg2://host/db", run) == tmp_path / "mlartifacts"
    assert artifact_root(f"sqlite:///{tmp_path}/sub/a.db?timeout=5", run) == tmp_path / "sub/mlartifacts"


def test_artifacts_of_a_bare_database_are_next_to_it(database: str, tmp_path: Path) -> None:
    sink, run_id = attached(database, tmp_path / "run")
    (tmp_path / "final.safetensors").write_text("weights")
    sink.send_artifact(tmp_path / "final.safetensors", "snapshots")
    assert (tmp_path / "mlartifacts" / "my_experiment" / run_id / "artifacts/snapshots/final.safetensors").exists()


def test_changed_params_and_tags_of_a_resumed_run_become_tags(database: str, tmp_path: Path) -> None:
    sink, _ = attached(database, tmp_path / "run")
    sink.describe(opening({"a": "1", "b": "x" * 7000, "c?": "3"}, {"git_commit": "one"}))
    for _ in range(2):  # twice: a repeated delivery
        sink.describe(opening({"a": "2", "b": "x" * 7000, "new": "4"}, {"git_commit": "two"}, step=100))
    data = only_run(database).data
    assert data.params == {"a": "1", "b": "x" * 5997 + "...", "c_": "3", "new": "4"}
    assert data.tags["git_commit"] == "one"
    assert {key: value for key, value in data.tags.items() if key.startswith("resumed")} == {
        "resumed/100/a": "2",
        "resumed/100/git_commit": "two",
    }


def test_points_that_are_not_numbers_are_kept(database: str, tmp_path: Path) -> None:
    sink, _ = attached(database, tmp_path / "run")
    for step, value in enumerate([float("nan"), float("inf"), 1.0]):
        sink.send_points([Point(key="loss: [d]", value=value, step=step, at=1)])
    assert sink.known_steps("loss: [d]") == {0, 1, 2}
    assert sink.known_steps("other") == set()


def test_points_whose_answer_is_lost_arrive_once(tmp_path: Path) -> None:
    class Lost(MlflowSink):
        answers = 0

        def send_points(self, points: Sequence[Point]) -> None:
            super().send_points(points)
            self.answers += 1
            if self.answers == 1:
                raise TimeoutError

    run, uri = tmp_path / "run", f"file://{tmp_path}/store"
    spool = Spool(run)
    spool.open(step=None, run_id=None, run_name="name", experiment="my experiment", params={}, tags={})
    for step in range(600):  # several batches, each of several requests
        spool.metrics(step, {"loss": 1.0, "rate": 2.0, "other": 3.0})
    spool.close("FINISHED")
    sink = Lost(uri, run)
    upload = Uploader(run, sink, target=uri, timeout_s=30, trainer_lives=lambda: False, sleep=lambda seconds: None)
    assert upload.run() == 0
    assert sink.answers > 2
    assert steps(uri) == steps(uri, "other") == list(range(600))


def test_image_sent_twice_is_one_image_and_named_as_mlflow_names_it(database: str, tmp_path: Path) -> None:
    sink, run_id = attached(database, tmp_path / "run")
    picture = Image.new("RGB", (300, 200))
    picture.save(tmp_path / "grid.png")
    for _ in range(2):
        sink.send_image("samples/ema", 10, 1_700_000_000_000, tmp_path / "grid.png")
    client = mlflow.MlflowClient(database)
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"

    def names() -> list[str]:
        uid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        return sorted(re.sub(uid, "UUID", file.path) for file in client.list_artifacts(run_id, "images"))

    ours = names()
    assert len(ours) == 2
    client.log_image(run_id, picture, key="samples/ema", step=10, timestamp=1_700_000_000_000)
    assert names() == sorted(2 * ours)


def test_file_that_is_no_image_is_refused(database: str, tmp_path: Path) -> None:
    sink, _ = attached(database, tmp_path / "run")
    (tmp_path / "grid.png").write_text("text")
    with pytest.raises(RefusedError, match="is no image"):
        sink.send_image("samples", 1, 1, tmp_path / "grid.png")


def test_invalid_point_is_refused_but_not_while_the_run_is_in_the_bin(database: str, tmp_path: Path) -> None:
    sink, run_id = attached(database, tmp_path / "run")
    with pytest.raises(RefusedError):
        sink.send_points([Point(key="", value=1.0, step=1, at=1)])
    mlflow.MlflowClient(database).delete_run(run_id)
    with pytest.raises(RuntimeError, match=f"mlflow runs restore --run-id {run_id}"):
        sink.send_points([Point(key="loss", value=1.0, step=1, at=1)])


def test_unknown_run_is_gone(database: str, tmp_path: Path) -> None:
    sink, _ = attached(database, tmp_path / "run")
    sink._run_id = "0" * 32
    with pytest.raises(RunGoneError):
        sink.send_points([Point(key="loss", value=1.0, step=1, at=1)])


def test_nothing_to_deliver_and_a_password_that_is_not_kept_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert f"{spool_path(tmp_path)} is no spool of a run" in caplog.text

    class NotStarted(UploaderProcess):
        def start(self) -> None: ...

    opened(tmp_path, "http://user:secret@127.0.0.1:1", uploader=NotStarted)
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert "Set MLFLOW_TRACKING_URI to the whole URI" in caplog.text


# With real processes


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


@pytest.mark.slow
def test_refusing_server_gets_everything_when_it_is_back(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(empty_database, tmp_path / "server.db")
    monkeypatch.chdir(tmp_path)  # the server makes a default database in the current folder
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri, run = f"http://127.0.0.1:{port}", tmp_path / "run"
    tracked = opened(run, uri)
    tracked.log_metrics(0, {"loss": float("nan")})
    from mlflow.server import app, constants  # takes a second or two, while the uploader starts

    monkeypatch.setenv(constants.BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv(constants.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    monkeypatch.setenv(constants.ARTIFACTS_DESTINATION_ENV_VAR, str(tmp_path / "kept"))
    monkeypatch.setenv(constants.SERVE_ARTIFACTS_ENV_VAR, "true")
    wait_for(lambda: "ConnectionError" in (run / "tracking/delivery.log").read_text())
    server = make_server("127.0.0.1", port, app)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for step in range(1, 300):
            tracked.log_metrics(step, {"loss": 1.0})
        # The end waits some seconds for a server that is down, and the pauses between attempts have grown.
        wait_for(lambda: load_progress(run, uri).offset == spool_path(run).stat().st_size, timeout_s=120)
        Image.new("RGB", (8, 8)).save(run / "grid.png")
        tracked.log_image(299, "samples", run / "grid.png")
        tracked.log_artifact(run / "grid.png", "snapshots")
        tracked.close("KILLED")
        assert steps(uri) == list(range(300))
        ended = only_run(uri)
        assert ended.info.run_id == tracked.run_id
        assert ended.info.status == "KILLED"
        assert ended.data.params == {"training.r1_gamma": "0.05", "tracking.uri": uri}
        assert ended.data.tags["index_sha256"] == "digest"
        client = mlflow.MlflowClient(uri)
        assert {file.path for file in client.list_artifacts(ended.info.run_id)} == {
            "config.yaml",
            "images",
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
from tests.trainer.tracking.opened import opened
tracked = opened(Path({str(run)!r}), {uri!r})
for step in range(10, 131, 10):
    tracked.log_metrics(step, {{"loss": 1.0}})
print(tracked._uploader.pid, flush=True)
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
