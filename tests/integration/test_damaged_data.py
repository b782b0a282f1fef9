"""What a user of damaged data sees: a refusal before anything starts, or samples named in MLflow."""

import shutil
from pathlib import Path

import mlflow
import pytest

from tests.launch import run_python, train_command
from tests.trainer.runs import damaged_copy

pytestmark = pytest.mark.slow


def as_worker(arguments: list[str]) -> list[str]:
    """The same run as one plain process, without Ray."""
    return [argument.replace("trainer.run", "trainer.worker") for argument in arguments]


def test_damaged_samples_are_counted_and_named_in_mlflow(tiny: tuple[str, ...], tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "mine"
    settings = damaged_copy(tiny, tmp_path / "data", *range(0, 1797, 25))
    # By their hashes the damage would be refused at the start.
    more = ("engine.backend=torch", "scaling.world_size=1", "data.verify=size", "tracking.backends=[mlflow]")
    done = run_python(as_worker(train_command("digits", settings, directory, *more)))
    assert done.returncode == 0, done.stderr[-3000:]
    named = (directory / "replaced-samples.txt").read_text().splitlines()
    assert named
    assert all(line in done.stderr for line in named)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    curve = client.get_metric_history(run.info.run_id, "replaced_samples")
    assert sum(point.value for point in curve) == len(named)
    artifact = client.download_artifacts(run.info.run_id, "data/replaced-samples.txt", str(tmp_path))
    assert Path(artifact).read_text().splitlines() == named


@pytest.mark.parametrize("module", ["trainer.run", "trainer.worker"])
def test_missing_and_altered_shards_are_named_before_anything_starts(
    tiny: tuple[str, ...], tiny_digits: Path, tmp_path: Path, module: str
) -> None:
    shutil.copytree(tiny_digits, tmp_path / "data")
    content = bytearray((tmp_path / "data" / "00000.tar").read_bytes())
    content[2000] ^= 1
    (tmp_path / "data" / "00000.tar").write_bytes(content)
    arguments = train_command("digits", tiny, tmp_path / "run", f"data.path={tmp_path / 'data'}")
    command = arguments if module == "trainer.run" else as_worker(arguments)
    altered = run_python(command)
    assert altered.returncode == 2
    assert "shard 00000.tar was altered, its SHA-256 is" in altered.stderr
    (tmp_path / "data" / "00000.tar").unlink()
    missing = run_python(command)
    assert missing.returncode == 2
    assert "shard 00000.tar is missing" in missing.stderr
    for done in (altered, missing):
        assert "Traceback" not in done.stderr
        assert "worker group" not in done.stderr
    assert not (tmp_path / "run").exists()
