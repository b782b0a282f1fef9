"""Databases of MLflow, which take seconds to make, and an environment without the trackers' variables."""

import shutil
from pathlib import Path

import pytest

from trainer.tracking.mlflow_sink import MlflowSink


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "ENABLE_ASYNC_LOGGING"):
        monkeypatch.setenv(f"MLFLOW_{name}", "5")  # MlflowSink sets them; this restores them


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialized database: making one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "runs" / "mlflow.db"
    MlflowSink(f"sqlite:///{path}", path.parent / "run")._client.search_experiments()
    assert {file.name for file in path.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    """URI of the default store of a run in `tmp_path / "run"`."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
