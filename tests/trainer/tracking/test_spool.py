import json
import os
from pathlib import Path

import pytest

from trainer.tracking.spool import (
    Progress,
    RunRecords,
    Spool,
    count_left,
    is_closed,
    load_progress,
    progress_path,
    read_curves,
    read_records,
    save_progress,
    spool_path,
)


def opened(run: Path, last_step: int | None = None) -> Spool:
    spool = Spool(run, last_step=last_step, clock_ms=lambda: 1_700_000_000_000)
    spool.open(step=last_step, params={}, tags={})
    return spool


def metric_steps(run: Path, key: str = "loss") -> list[int | None]:
    records = read_records(spool_path(run))
    return [record.step for record in records if record.kind == "metrics" and key in record.payload["metrics"]]


def test_records_come_back_in_order_with_what_was_put_in(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.metrics(10, {"loss": 0.5, "rate": 2})
    spool.image(10, "samples", tmp_path / "samples" / "10.png")
    spool.close("FINISHED")
    _, metrics, image, close = read_records(spool_path(tmp_path))
    assert (metrics.kind, metrics.step, metrics.at) == ("metrics", 10, 1_700_000_000_000)
    assert metrics.payload == {"metrics": {"loss": 0.5, "rate": 2.0}}
    assert image.payload == {"key": "samples", "path": "samples/10.png"}
    assert (close.kind, close.payload) == ("close", {"status": "FINISHED"})


def test_offsets_of_records_tile_the_file(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for step in range(5):
        spool.metrics(step, {"loss": 1.0})
    records = list(read_records(spool_path(tmp_path)))
    assert [record.start for record in records] == [0, *(record.end for record in records[:-1])]
    assert records[-1].end == spool_path(tmp_path).stat().st_size
    assert list(read_records(spool_path(tmp_path), records[2].end)) == records[3:]


def test_run_killed_at_130_and_resumed_from_100_spools_each_step_once(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for step in range(10, 131, 10):
        spool.metrics(step, {"loss": step})
        spool.image(step, "samples", tmp_path / f"{step}.png")
    resumed = opened(tmp_path, last_step=100)
    for step in range(110, 201, 10):
        resumed.metrics(step, {"loss": step})
        resumed.image(step, "samples", tmp_path / f"{step}.png")
    assert metric_steps(tmp_path) == list(range(10, 201, 10))
    images = [record.step for record in read_records(spool_path(tmp_path)) if record.kind == "image"]
    assert images == list(range(10, 201, 10))


def test_run_restarted_before_its_first_checkpoint_spools_each_step_once(tmp_path: Path) -> None:
    for _ in range(2):
        spool = opened(tmp_path)
        for step in (0, 10, 20):
            spool.metrics(step, {"loss": 1.0})
    assert metric_steps(tmp_path) == [0, 10, 20]


def test_second_point_of_a_curve_at_a_step_is_dropped_and_another_curve_is_kept(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.metrics(10, {"loss": 1.0})
    spool.metrics(10, {"loss": 2.0, "fid": 3.0})
    assert metric_steps(tmp_path, "loss") == [10]
    assert metric_steps(tmp_path, "fid") == [10]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_torn_last_line_is_cut_off_and_its_step_can_come_again(tmp_path: Path, cut: int) -> None:
    spool = opened(tmp_path)
    spool.metrics(10, {"loss": 1.0})
    spool.metrics(20, {"loss": 2.0})
    path = spool_path(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    assert metric_steps(tmp_path) == [10]
    resumed = opened(tmp_path, last_step=10)
    resumed.metrics(20, {"loss": 2.0})
    assert metric_steps(tmp_path) == [10, 20]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_torn_first_line_leaves_an_empty_spool(tmp_path: Path) -> None:
    spool_path(tmp_path).parent.mkdir()
    spool_path(tmp_path).write_text('{"kind": "op')
    opened(tmp_path)
    assert [record.kind for record in read_records(spool_path(tmp_path))] == ["open"]


def test_uid_is_the_same_for_the_same_folder_and_differs_between_folders(tmp_path: Path) -> None:
    first = opened(tmp_path / "a")
    assert opened(tmp_path / "a").uid == first.uid
    assert opened(tmp_path / "b").uid != first.uid


def test_artifact_is_spooled_again_only_when_the_file_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: 1")
    opened(tmp_path).artifact(file, "configs")
    spool = opened(tmp_path)
    spool.artifact(file, "configs")
    spool.artifact(file, "configs")
    assert sum(record.kind == "artifact" for record in read_records(spool_path(tmp_path))) == 1
    file.write_text("a: 22")
    spool.artifact(file, "configs")
    assert sum(record.kind == "artifact" for record in read_records(spool_path(tmp_path))) == 2


def test_file_outside_the_run_keeps_its_whole_path(tmp_path: Path) -> None:
    spool = opened(tmp_path / "run")
    spool.image(1, "samples", tmp_path / "elsewhere.png")
    assert list(read_records(spool_path(tmp_path / "run")))[-1].payload["path"] == str(tmp_path / "elsewhere.png")


def test_full_disk_is_said_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = opened(tmp_path)
    real_write = os.write

    def write_half(file: int, data: bytes) -> int:
        return real_write(file, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_half)
        for step in range(5):
            spool.metrics(step, {"loss": 1.0})
    spool.metrics(5, {"loss": 1.0})
    assert metric_steps(tmp_path) == [5]
    assert count_left(spool_path(tmp_path), Progress()) == 2
    (warning,) = caplog.messages
    assert "training continues" in warning and str(spool_path(tmp_path)) in warning


def test_line_that_is_no_record_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = opened(tmp_path)
    os.write(os.open(spool_path(tmp_path), os.O_WRONLY | os.O_APPEND), b'garbage\n[1]\n{"kind": "metrics"}\n')
    spool.metrics(10, {"loss": 1.0})
    assert metric_steps(tmp_path) == [10]
    assert "is no record" in caplog.text


def test_spool_is_closed_by_a_close_and_open_again_after_the_next_open(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert not is_closed(spool_path(tmp_path))
    spool.close("KILLED")
    assert is_closed(spool_path(tmp_path))
    opened(tmp_path)
    assert not is_closed(spool_path(tmp_path))


def test_progress_is_noted_for_one_target_and_anything_unreadable_means_the_start(tmp_path: Path) -> None:
    progress_path(tmp_path, "mlflow").parent.mkdir(parents=True)
    noted = Progress(target="a", run_id="r", offset=7, refused=1, trouble="t")
    save_progress(tmp_path, "mlflow", noted)
    assert load_progress(tmp_path, "mlflow", "a") == noted
    assert load_progress(tmp_path, "mlflow", "b") == Progress(target="b")
    for text in ("", "{", "[]", '{"other": 1}'):
        progress_path(tmp_path, "mlflow").write_text(text)
        assert load_progress(tmp_path, "mlflow", "a") == Progress(target="a")


def test_spool_of_a_version_that_named_no_backend_is_read(tmp_path: Path) -> None:
    spool_path(tmp_path).parent.mkdir()
    lines = (
        {"kind": "open", "at": 1, "step": None, "uid": "u", "run_id": None, "run_name": "n", "experiment": "e"}
        | {"uri": "sqlite:///a.db", "uri_source": "config", "params": {}, "tags": {}},
        {"kind": "metrics", "at": 2, "step": 10, "metrics": {"loss": 1.0}},
    )
    spool_path(tmp_path).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    spool = opened(tmp_path, last_step=0)
    assert count_left(spool_path(tmp_path), Progress()) == 3
    spool.metrics(10, {"loss": 1.0})
    spool.metrics(20, {"loss": 1.0})
    assert spool.uid == "u"
    assert metric_steps(tmp_path) == [10, 20]


def own_steps(run: Path) -> list[int | None]:
    own = RunRecords(spool_path(run)).own
    return [record.step for record in read_records(spool_path(run)) if own(record) and record.kind == "metrics"]


def test_new_run_takes_over_the_points_up_to_its_checkpoint_and_none_without_one(tmp_path: Path) -> None:
    def report(spool: Spool, *steps: int) -> None:
        spool.image(steps[0], "samples", tmp_path / "a.png")
        for step in steps:
            spool.metrics(step, {"loss": 1.0})

    report(opened(tmp_path), 10, 20, 30)
    second = Spool(tmp_path, last_step=20)
    assert second.is_ahead
    second.begin_new_run()
    second.open(step=20, params={}, tags={})
    report(second, 30, 40)
    assert own_steps(tmp_path) == [10, 20, 30, 40]
    third = Spool(tmp_path, last_step=30)
    assert third.uid == second.uid
    third.begin_new_run()
    third.open(step=30, params={}, tags={})
    report(third, 40)
    assert own_steps(tmp_path) == [10, 20, 30, 40]
    assert metric_steps(tmp_path) == [10, 20, 30, 30, 40, 40]
    fourth = Spool(tmp_path)
    fourth.begin_new_run()
    fourth.open(step=None, params={}, tags={})
    assert own_steps(tmp_path) == []
    assert count_left(spool_path(tmp_path), Progress()) == 1
    report(fourth, 10)
    assert own_steps(tmp_path) == [10]


def test_progress_is_that_of_one_run(tmp_path: Path) -> None:
    progress_path(tmp_path, "mlflow").parent.mkdir(parents=True)
    noted = Progress(target="a", uid="one", run_id="r", offset=7, waiting=(3, 5))
    save_progress(tmp_path, "mlflow", noted)
    assert load_progress(tmp_path, "mlflow", "a", "one") == noted
    assert load_progress(tmp_path, "mlflow", "a", "two") == Progress(target="a", uid="two")


def test_files_that_wait_are_left_and_named(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.metrics(10, {"loss": 1.0})
    noted = Progress(offset=spool_path(tmp_path).stat().st_size, waiting=(3, 5), files_trouble="no rights")
    assert count_left(spool_path(tmp_path), noted) == 2
    assert noted.problem == "it takes curves, but no files: no rights"
    assert Progress().problem is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "metrics", "at": 1, "step": 9, "metrics": 5}',
        b'{"kind": "metrics", "at": 1, "step": 9, "metrics": {"loss": "x"}}',
        b'{"kind": "metrics", "at": "1", "step": 9, "metrics": {}}',
        b'{"kind": "metrics", "at": 1, "step": [9], "metrics": {}}',
        b'{"kind": "open", "at": 1, "step": 9, "uie": "x"}',
        b'{"kind": "image", "at": 1, "step": 9, "key": [], "path": "x"}',
        b'{"kind": "artifact", "at": 1, "step": null, "path": 7, "folder": null}',
        b'{"kind": ["x"], "at": 1, "step": null}',
        b'{"kind": "stranger", "at": 1, "step": null}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda line: line[:60],
)
def test_line_of_the_wrong_form_is_passed_over_and_the_run_continues(tmp_path, line):
    path = spool_path(tmp_path)
    path.parent.mkdir()
    path.write_bytes(line + b"\n")
    spool = Spool(tmp_path)
    spool.metrics(9, {"loss": 1.0})
    assert [record.payload for record in read_records(path)] == [{"metrics": {"loss": 1.0}}]


@pytest.mark.parametrize(
    "content", [b"\xff", b"[]", b'{"offset": "x"}', b'{"offset": -1}', b'{"run_id": 5}', b'{"a": 1}']
)
def test_damaged_progress_is_set_aside_and_the_upload_begins_again(tmp_path, content):
    progress_path(tmp_path, "mlflow").parent.mkdir(parents=True)
    progress_path(tmp_path, "mlflow").write_bytes(content)
    assert load_progress(tmp_path, "mlflow", "there") == Progress(target="there")
    assert not progress_path(tmp_path, "mlflow").exists()


def test_curves_are_those_of_the_newest_run_with_the_first_point_of_a_step(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    spool = opened(tmp_path)
    for step in (20, 10):
        spool.metrics(step, {"loss": step / 10})
    assert read_curves(tmp_path) == {"loss": [(10, 1.0), (20, 2.0)]}
    again = Spool(tmp_path)
    again.begin_new_run()
    again.open(step=None, params={}, tags={})
    again.metrics(10, {"loss": 5.0})
    assert read_curves(tmp_path) == {"loss": [(10, 5.0)]}
