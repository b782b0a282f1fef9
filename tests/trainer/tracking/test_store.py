from pathlib import Path

import pytest

from trainer.config.sections import TrackingConfig
from trainer.tracking.store import choose_store, tracking_uri


@pytest.fixture(autouse=True)
def no_uri_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_default_store_is_a_database_next_to_the_run(tmp_path: Path) -> None:
    uri = tracking_uri(TrackingConfig(), tmp_path / "runs" / "one")
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_environment_wins_over_default_and_config_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert tracking_uri(TrackingConfig(), tmp_path) == "http://environment:5000"
    assert tracking_uri(TrackingConfig(uri="http://config:5000"), tmp_path) == "http://config:5000"
    assert choose_store(None, tmp_path).source == "environment"
    assert choose_store("http://config:5000", tmp_path).source == "config"


@pytest.mark.parametrize(
    ("relative", "absolute"),
    [
        ("sqlite:///sub/a.db", "sqlite:///{}/sub/a.db"),
        ("sqlite:///a.db?timeout=5", "sqlite:///{}/a.db?timeout=5"),
        ("sqlite+pysqlite:///a.db", "sqlite+pysqlite:///{}/a.db"),
        ("mlruns", "file://{}/mlruns"),
        ("./mlruns", "file://{}/mlruns"),
        ("file:mlruns", "file://{}/mlruns"),
        ("sqlite:////abs/a.db", "sqlite:////abs/a.db"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("/abs/mlruns", "file:///abs/mlruns"),
        ("databricks", "databricks"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_relative_paths_start_next_to_the_run(tmp_path: Path, relative: str, absolute: str) -> None:
    assert choose_store(relative, tmp_path / "run").uri == absolute.format(tmp_path)
