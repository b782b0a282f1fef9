"""MLflow itself: its stores, in this process.

A file store appends a point each time it is sent, so it shows a doubled one; a database hides it.
"""

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from wsgiref.simple_server import make_server

import mlflow
import pytest
from mlflow.tracking._tracking_service import utils
from PIL import Image

from tests.trainer.tracking.helpers.mlflow_stores import only_run, steps
from tests.trainer.tracking.helpers.opened import opened
from trainer.tracking.command import main
from trainer.tracking.mlflow_sink import MlflowSink, artifact_root
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record, Spool, spool_path
from trainer.tracking.tracker import UploaderProcess
from trainer.tracking.uploader import Uploader


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


@pytest.mark.slow
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
    upload = Uploader(
        run, "mlflow", sink, target=uri, timeout_s=30, trainer_lives=lambda: False, sleep=lambda seconds: None
    )
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


def test_deleted_run_is_wanted_back_unless_its_tracking_folder_was_removed(database: str, tmp_path: Path) -> None:
    _, run_id = attached(database, tmp_path / "run")
    mlflow.MlflowClient(database).delete_run(run_id)
    with pytest.raises(RuntimeError, match=rf"restore --run-id {run_id}` brings .* deliver --new-run --run {tmp_path}"):
        MlflowSink(database, tmp_path / "run").attach(opening(), run_id)
    other = opening(run_id=run_id)
    other.payload["uid"] = "another-uid"
    found, created = MlflowSink(database, tmp_path / "run").attach(other, None)
    assert created and found != run_id


def test_deleted_experiment_is_named_and_gets_the_run_when_it_is_restored(database: str, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(database)
    number = client.create_experiment("my experiment")
    client.delete_experiment(number)
    sink = MlflowSink(database, tmp_path / "run")
    with pytest.raises(
        RuntimeError, match=rf"restore --experiment-id {number}` brings it back, or set tracking.experi"
    ):
        sink.attach(opening(), None)
    client.restore_experiment(number)
    assert sink.attach(opening(), None)[1]


def test_artifacts_of_a_moved_store_go_to_its_new_place(database: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    (tmp_path / "mlflow.db").rename(before / "mlflow.db")
    (tmp_path / "file").write_text("x")
    sink, run_id = attached(f"sqlite:///{before}/mlflow.db", before / "run")
    sink.send_artifact(tmp_path / "file", "first")
    before.rename(after)
    uri = f"sqlite:///{after}/mlflow.db"
    utils._artifact_repos_cache.clear()  # an uploader is a process of its own
    sink = MlflowSink(uri, after / "run")
    assert sink.attach(opening(), run_id) == (run_id, False)
    sink.send_artifact(tmp_path / "file", "second")
    assert not before.exists()
    assert [file.path for file in mlflow.MlflowClient(uri).list_artifacts(run_id)] == ["first", "second"]


def test_refused_user_is_told_what_to_set(tmp_path: Path) -> None:
    def refuse(environment: object, start: Callable[..., object]) -> list[bytes]:
        start("401 Unauthorized", [("Content-Type", "text/html")])
        return [b"<html>401</html>"]

    server = make_server("127.0.0.1", 0, refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        sink = MlflowSink(f"http://user:pa55w0rd@127.0.0.1:{server.server_port}", tmp_path)
        sink.limit_requests(5)
        with pytest.raises(PermissionError, match=r"refuses this user .* set MLFLOW_TRACKING_USERNAME and"):
            sink.attach(opening(), None)
    finally:
        server.shutdown()


def test_unknown_run_is_gone(database: str, tmp_path: Path) -> None:
    sink, _ = attached(database, tmp_path / "run")
    sink._run_id = "0" * 32
    with pytest.raises(RunGoneError):
        sink.send_points([Point(key="loss", value=1.0, step=1, at=1)])


def test_nothing_to_deliver_and_a_password_that_is_not_kept_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert f"{spool_path(tmp_path)} is no spool of a run" in capsys.readouterr().err

    class NotStarted(UploaderProcess):
        def start(self) -> None: ...

    opened(tmp_path, "http://user:secret@127.0.0.1:1", uploader=NotStarted)
    assert main(["deliver", "--run", str(tmp_path)]) == 2
    assert "Set MLFLOW_TRACKING_URI to the whole URI" in capsys.readouterr().err
