from pathlib import Path

import pytest

from trainer.config.sections import TrackingConfig
from trainer.tracking.store import (
    LIBRARIES,
    TrackingError,
    check_store,
    check_trackers,
    choose_store,
    secrets_of,
    tracker_uris,
)


@pytest.fixture(autouse=True)
def plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_default_store_is_a_database_next_to_the_run(tmp_path: Path) -> None:
    uri = tracker_uris(TrackingConfig(), tmp_path / "runs" / "one")["mlflow"]
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_environment_wins_over_default_and_config_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert tracker_uris(TrackingConfig(), tmp_path)["mlflow"] == "http://environment:5000"
    assert tracker_uris(TrackingConfig(uri="http://config:5000"), tmp_path)["mlflow"] == "http://config:5000"
    assert choose_store(None, tmp_path).source == "environment"
    assert choose_store("http://config:5000", tmp_path).source == "config"


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("sqlite:///sub/a.db", "sqlite:///{}/sub/a.db"),
        ("sqlite:///a.db?timeout=5", "sqlite:///{}/a.db?timeout=5"),
        ("sqlite+pysqlite:///a.db", "sqlite+pysqlite:///{}/a.db"),
        ("sqlite:///~/a.db", "sqlite:///{}/home/a.db"),
        ("mlruns", "file://{}/mlruns"),
        ("./mlruns", "file://{}/mlruns"),
        ("./localhost:5000", "file://{}/localhost%3A5000"),
        ("~/mlruns", "file://{}/home/mlruns"),
        ("file:mlruns", "file://{}/mlruns"),
        ("sqlite:////abs/a.db", "sqlite:////abs/a.db"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("/abs/mlruns", "file:///abs/mlruns"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        (" http://localhost:5000 ", "http://localhost:5000"),
        ("https://me:pa55w0rd@host/path", "https://me:pa55w0rd@host/path"),
        ("http://[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_uris_are_understood_and_relative_paths_start_next_to_the_run(
    tmp_path: Path, given: str, understood: str
) -> None:
    assert choose_store(given.format(tmp_path), tmp_path / "run").uri == understood.format(tmp_path)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("localhost:5000", "did you mean http://localhost:5000? For a folder of that name write ./localhost:5000"),
        ("127.0.0.1:5999", "did you mean http://127.0.0.1:5999?"),
        ("mlflow.example.org", "did you mean http://mlflow.example.org?"),
        ("http//localhost:5000", "did you mean http://localhost:5000?"),
        ("http:/localhost:5000", "did you mean http://localhost:5000?"),
        ("htp://localhost:5000", "MLflow knows no htp:// (did you mean http://localhost:5000?)"),
        ("ftp://localhost/x", "MLflow knows no ftp://"),
        ("s3://bucket/x", "MLflow knows no s3://"),
        ("http://", "it names no host. Write it as http://host:port"),
        ("http://localhost:abc", "its port is no number up to 65535"),
        ("http://localhost:99999", "its port is no number"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://local host:1", "it holds a blank"),
        ('""', "quotes"),
        ("http://a\nb", "cannot be printed"),
        ("sqlite://mlflow.db", "write sqlite:///mlflow.db for a file next to the run"),
        ("sqlite:mlflow.db", "write sqlite:///mlflow.db"),
        ("sqlite://", "it names no file"),
        ("sqlite:///:memory:", "it names no file"),
        ("sqlite:///$NOT_SET/a.db", "NOT_SET is not set"),
        ("postgresql+pg8000://u:pw@localhost/db", "needs the Python package pg8000, which is not installed here"),
        ("postgresql://u:pw@localhost:port/db", "its port is no number"),
        ("file://host/x", "it names no folder of this host"),
    ],
)
def test_uri_that_cannot_work_is_refused_in_one_line(
    tmp_path: Path, uri: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackingError) as refused:
        choose_store(uri, tmp_path / "run")
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith("tracking.uri is ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=r"^MLFLOW_TRACKING_URI is "):
        choose_store(None, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("password", ["pa55w0rd", "pa55 w0rd", "pa55@w0rd", "pa55/w0rd"])
def test_refusal_shows_no_password(tmp_path: Path, password: str) -> None:
    for uri in (f"https://me:{password}@host:port", f"htp://me:{password}@host"):
        with pytest.raises(TrackingError) as refused:
            choose_store(uri, tmp_path)
        assert "pa55" not in str(refused.value) and "w0rd" not in str(refused.value)


def test_password_that_a_file_lacks_is_taken_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "http://***@host:5000"
    with pytest.raises(TrackingError, match=r"its password is kept in no file. Set MLFLOW_TRACKING_URI to the whole"):
        choose_store(written, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55w0rd@elsewhere:5000")
    with pytest.raises(TrackingError, match="password"):
        choose_store(written, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55w0rd@host:5000")
    assert choose_store(written, tmp_path).uri == "http://me:pa55w0rd@host:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55w0rd")
    assert choose_store(written, tmp_path).uri == "http://host:5000"


def test_tracker_without_its_library_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIBRARIES, "wandb", "wandb_of_nowhere")
    config = TrackingConfig(backends=("mlflow", "wandb"))
    words = (
        r"tracker wandb needs .*, which is not installed here: pip install '.\[wandb\]', or take wandb out of tracking"
    )
    with pytest.raises(TrackingError, match=words):
        check_trackers(config, tmp_path / "run")
    (tmp_path / "wandb_of_nowhere").mkdir()  # as W&B's own folder of runs, in the current folder
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrackingError, match=words):
        check_trackers(config, tmp_path / "run")
    check_trackers(TrackingConfig(backends=("mlflow", "tensorboard")), tmp_path / "run")


def test_wandb_is_at_its_server_or_offline_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackingConfig(backends=("tensorboard", "wandb"), uri="htp://nowhere")  # the URI is MLflow's
    check_store(config, tmp_path)
    folder = {"tensorboard": f"{tmp_path}/tensorboard"}
    assert tracker_uris(config, tmp_path) == {**folder, "wandb": "https://api.wandb.ai"}
    monkeypatch.setenv("WANDB_BASE_URL", "http://mine:8080")
    assert tracker_uris(config, tmp_path) == {**folder, "wandb": "http://mine:8080"}
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker_uris(config, tmp_path) == {**folder, "wandb": f"{tmp_path}/tracking/wandb"}


def test_secrets_are_known_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    monkeypatch.setenv("WANDB_API_KEY", "k3y")
    assert set(secrets_of("http://me:pa55%20w0rd@host")) == {"pa55%20w0rd", "pa55 w0rd", "t0ken", "k3y"}


def test_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = TrackingConfig(uri="sqlite:///index.json")
    check_store(config, tmp_path / "run")
    (tmp_path / "index.json").write_text('{"not": "a database"}')
    with pytest.raises(TrackingError, match=r"that file is no SQLite database"):
        check_store(config, tmp_path / "run")
    check_store(TrackingConfig(backends=(), uri="sqlite:///index.json"), tmp_path / "run")
    with pytest.raises(TrackingError, match="names a folder"):
        check_store(TrackingConfig(uri=f"sqlite:///{tmp_path}"), tmp_path / "run")
    assert (tmp_path / "index.json").read_text() == '{"not": "a database"}'
