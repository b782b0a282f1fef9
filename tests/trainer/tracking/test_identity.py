"""Which starts continue a run on the server, and which begin a new one."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tracking import opened as helper
from trainer.tracking.identity import begin_new_run
from trainer.tracking.spool import RunRecords, read_records, spool_path
from trainer.tracking.tracker import UploaderProcess


class NoProcess(UploaderProcess):
    def start(self) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        return True


opened = partial(helper.opened, uri="http://host", uploader=NoProcess)


def uid(run: Path) -> str:
    bound = json.loads((run / "tracking/identity.json").read_text())
    assert bound["uid"] == RunRecords(spool_path(run)).uid
    assert bound["directory"] == str(run)
    return bound["uid"]


def trained(run: Path, *steps: int, **options: Any) -> str:
    """Train and stop at the last step; returns the run's own id."""
    tracker = opened(run, **options)
    for step in steps:
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.close("KILLED")
    return uid(run)


def test_copy_reports_to_a_run_of_its_own_and_the_original_to_its_former_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    original = trained(first, 10, 20)
    shutil.copytree(first, second)
    copy = trained(second, 30, last_step=20, run_id="of the original")
    assert copy != original
    assert f"{second} is a copy of {first}, which keeps its run" in caplog.text
    assert RunRecords(spool_path(second)).opening.payload["run_id"] is None
    own = filter(RunRecords(spool_path(second)).own, read_records(spool_path(second)))
    assert [record.step for record in own if record.kind == "metrics"] == [10, 20, 30]
    caplog.clear()
    assert trained(second, 40, last_step=30) == copy
    assert trained(first, 30, last_step=20) == original
    shutil.copytree(second, third)
    assert "copy" not in caplog.text
    assert trained(third, 50, last_step=40) not in (original, copy)


def test_moved_run_and_one_that_a_link_names_stay_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    run = trained(tmp_path / "a/run", 10)
    (tmp_path / "a").rename(tmp_path / "b")
    assert trained(tmp_path / "b/run", 20, last_step=10) == run
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert trained(tmp_path / "a/run", 30, last_step=20) == run
    shutil.rmtree(tmp_path / "b/run")
    trained(tmp_path / "b/run", 10)  # another run at the place of the former
    assert trained(tmp_path / "b/run", 20, last_step=10) != run


@pytest.mark.parametrize("text", ["", "[]", '{"uid": 3, "directory": 3}', '{"uid": "x", "directory": "a\\u0000b"}'])
def test_unreadable_identity_is_written_again(tmp_path: Path, text: str) -> None:
    run = trained(tmp_path, 10)
    (tmp_path / "tracking/identity.json").write_text(text)
    assert trained(tmp_path, 20, last_step=10) == run


CHANGES = (
    ({"params": {"training.r1_gamma": 5}}, "training.r1_gamma"),
    ({"params": {"training.total_images": 9}}, "training.total_images"),
    ({"params": {"run.init_from": "other.safetensors"}}, "run.init_from"),
    ({"digest": "other"}, "the data"),
)
KNOWN = {"training.total_images": 1, "run.init_from": None, "scaling.world_size": 1, "engine.backend": "torch"}


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_start_without_a_checkpoint_and_with_other_settings_is_another_run(
    tmp_path: Path, change: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(tmp_path, 10, 20, params=KNOWN)
    changed = {"params": KNOWN} | change
    changed["params"] = KNOWN | changed["params"]
    assert trained(tmp_path, 10, **changed) != first
    assert f"no checkpoint, and the settings differ from those of the start before ({named}): the curves" in caplog.text
    own = filter(RunRecords(spool_path(tmp_path)).own, read_records(spool_path(tmp_path)))
    assert [record.kind for record in own] == ["open", "artifact", "metrics", "close"]
    assert "http://host" in (tmp_path / "tracking/config.yaml").read_text()
    assert not list(tmp_path.glob("tracking/config-resumed-*"))


def test_start_without_a_checkpoint_and_the_same_settings_is_the_same_run(tmp_path: Path) -> None:
    first = trained(tmp_path, 10, 20, params=KNOWN)
    more = {"scaling.world_size": 2, "engine.backend": "deepspeed", "tracking.log_interval_steps": 7}
    assert trained(tmp_path, 10, 20, 30, params=KNOWN | more) == first


def test_resumed_run_with_another_length_is_another_run_only_if_steps_come_again(tmp_path: Path) -> None:
    first = trained(tmp_path, 10, 20, params=KNOWN)
    longer = KNOWN | {"training.total_images": 9}
    assert trained(tmp_path, 30, last_step=20, params=longer) == first
    longest = KNOWN | {"training.total_images": 99}
    assert trained(tmp_path, 30, 40, last_step=20, params=longest) != first


def test_other_experiment_gets_a_run_of_its_own_with_all_curves(tmp_path: Path) -> None:
    first = trained(tmp_path, 10, 20)
    assert trained(tmp_path, 30, last_step=20, experiment="other") != first
    run = RunRecords(spool_path(tmp_path))
    assert run.opening.payload["experiment"] == "other"
    own = filter(run.own, read_records(spool_path(tmp_path)))
    assert [record.step for record in own if record.kind == "metrics"] == [10, 20, 30]


def test_new_run_on_demand_has_everything_and_the_same_end(tmp_path: Path) -> None:
    first = trained(tmp_path, 10, 20)
    begin_new_run(tmp_path)
    assert uid(tmp_path) != first
    own = list(filter(RunRecords(spool_path(tmp_path)).own, read_records(spool_path(tmp_path))))
    assert [record.kind for record in own] == ["artifact", "metrics", "metrics", "open", "close"]
    assert own[-1].payload["status"] == "KILLED"
