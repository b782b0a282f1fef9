"""MLflow itself: its stores in this process, and the whole way with real processes and real servers.

A file store appends a point each time it is sent, so it shows a doubled one; a database hides it.
"""

import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from PIL import Image

from tests.launch import ROOT, answers
from tests.trainer.tracking.opened import opened
from trainer.tracking import tracker
from trainer.tracking import tracker as courier
from trainer.tracking.command import main
from trainer.tracking.mlflow_sink import MlflowSink
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record, spool_path


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "5")  # MlflowSink sets them; this restores them


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


def num_points(uri: str, key: str = "loss") -> int:
    """Points that have arrived, of all runs; 0 as long as there is none."""
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return sum(len(client.get_metric_history(run.info.run_id, key)) for run in runs)


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


def test_artifacts_of_a_bare_database_are_beside_it(database: str, tmp_path: Path) -> None:
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
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert f"{spool_path(tmp_path)} is no spool of a run" in caplog.text
    monkeypatch.setattr(courier.Courier, "start", lambda self: None)
    opened(tmp_path, "http://user:secret@127.0.0.1:1")
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert "set MLFLOW_TRACKING_URI to the whole URI" in caplog.text


# With real processes


def replay(run: Path, *arguments: str) -> None:
    """The command that the warning names, as a user types it."""
    command = [sys.executable, "-m", "trainer.tracking", "deliver", "--run", str(run), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether a process that need not be our child runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def hanging_server() -> Iterator[tuple[int, list[socket.socket]]]:
    """Port of a server that accepts and never answers, and its connections."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    connections.append(server.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], connections
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_training_process_does_not_import_mlflow() -> None:
    code = "import sys, trainer.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_hanging_server_costs_the_flush_timeout_and_no_point(
    hanging_server: tuple[int, list[socket.socket]], database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, connections = hanging_server
    run = tmp_path / "run"
    tracked = opened(run, f"http://user:secret@127.0.0.1:{port}", flush_timeout_s=1)
    wait_for(lambda: bool(connections))
    for step in range(1000):
        tracked.log_metrics(step, {"loss": 1.0})
    began = time.monotonic()
    tracked.close("FINISHED")
    assert time.monotonic() - began < 5  # flush_timeout_s and slack for a busy machine
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "1003 records" in warning and f"--run {run}" in warning
    for file in run.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file
    replay(run, "--uri", database)  # it waits for the first delivery process to give up
    assert steps(database) == list(range(1000))
    assert only_run(database).info.status == "FINISHED"


@pytest.mark.slow
def test_refusing_server_gets_everything_when_it_is_back(tmp_path: Path, empty_database: Path) -> None:
    shutil.copyfile(empty_database, tmp_path / "server.db")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri, run = f"http://127.0.0.1:{port}", tmp_path / "run"
    tracked = opened(run, uri)
    tracked.log_metrics(0, {"loss": float("nan")})
    wait_for(lambda: "ConnectionError" in (run / "tracking/delivery.log").read_text())
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(command + store, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path)
    try:
        for step in range(1, 300):
            tracked.log_metrics(step, {"loss": 1.0})
        # The end waits some seconds for a server that is down. On a busy machine this one is slower to start, and the
        # pauses between attempts grow meanwhile.
        wait_for(lambda: answers(port), timeout_s=120)
        wait_for(lambda: num_points(uri) == 300, timeout_s=120)
        Image.new("RGB", (8, 8)).save(run / "grid.png")
        tracked.log_image(299, "samples", run / "grid.png")
        tracked.log_artifact(run / "grid.png", "snapshots")
        tracked.close("KILLED")
        assert steps(uri) == list(range(300))
        ended = only_run(uri)
        assert ended.info.run_id == tracked.run_id
        assert ended.info.status == "KILLED"
        assert ended.data.params == {"training.r1_gamma": "0.05"}
        assert ended.data.tags["index_sha256"] == "digest"
        client = mlflow.MlflowClient(uri)
        assert {file.path for file in client.list_artifacts(ended.info.run_id)} == {
            "config.yaml",
            "images",
            "snapshots",
        }
        assert len(client.list_artifacts(ended.info.run_id, "images")) == 2
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


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
print(tracked._courier.pid, flush=True)
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


@pytest.mark.slow
def test_delivery_process_killed_at_random_doubles_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "WATCH_S", 0.0)
    monkeypatch.setattr(courier, "RESTART_S", 0.0)
    run, uri = tmp_path / "run", f"file://{tmp_path}/store"
    tracked = opened(run, uri)
    assert isinstance(tracked, tracker.MlflowTracker)
    draw = random.Random(0)
    next_step = 0
    for _ in range(4):
        sending_from = (run / "tracking/delivered.json").stat().st_mtime_ns if next_step else 0

        def sends(since: int = sending_from) -> bool:
            note = run / "tracking/delivered.json"
            return note.exists() and note.stat().st_mtime_ns > since

        for _ in range(1500):
            tracked.log_metrics(next_step, {"loss": 1.0, "rate": 2.0})
            next_step += 1
        wait_for(sends)
        time.sleep(draw.uniform(0, 0.3))
        pid = tracked._courier.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not is_running(pid))
    tracked.close("FINISHED")
    assert steps(uri) == list(range(next_step))
    assert steps(uri, "rate") == list(range(next_step))
    assert only_run(uri).info.status == "FINISHED"
