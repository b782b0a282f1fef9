"""Which starts continue a run on the server, which begin a new one, and what a run says of its origin."""

import json
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.tracking.helpers import opened as helper
from trainer.tracking.identity import begin_new_run
from trainer.tracking.provenance import collect_tags
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


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_tags_name_commit_libraries_and_data(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "message")
    tags = collect_tags("digest", source=tmp_path)
    assert tags["git_commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert tags["git_dirty"] == "false"
    assert tags["index_sha256"] == "digest"
    assert tags["version.torch"] == torch.__version__
    assert tags["version.python"] == platform.python_version()
    assert {f"version.{name}" for name in ("deepspeed", "ray", "webdataset", "mlflow")} <= tags.keys()


def test_changed_file_makes_the_commit_dirty(tmp_path: Path) -> None:
    test_tags_name_commit_libraries_and_data(tmp_path)
    (tmp_path / "file").write_text("2")
    assert collect_tags("digest", source=tmp_path)["git_dirty"] == "true"


def test_code_without_a_checkout_has_an_unknown_commit(tmp_path: Path) -> None:
    tags = collect_tags("digest", source=tmp_path)
    assert (tags["git_commit"], tags["git_dirty"]) == ("unknown", "unknown")
