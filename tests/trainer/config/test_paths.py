"""Settings that name files: what is filled in, and what is refused by name."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from data.storage.paths import path_argument
from trainer.config.draft import ConfigError
from trainer.config.io import load_config, with_absolute_paths


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("~/runs/x", "{}/runs/x"),
        ("$HOME/runs/x", "{}/runs/x"),
        ("${SCRATCH}/x", "/scratch/me/x"),
        ("file:///shared/x", "/shared/x"),
        ("file://localhost/shared/a%20b", "/shared/a b"),
        ("/shared/costs$", "/shared/costs$"),
        ("/shared/a~b", "/shared/a~b"),
    ],
)
@pytest.mark.parametrize("inside_job", [False, True])
def test_home_variables_and_file_urls_are_understood(home: Path, given: str, found: str, inside_job: bool) -> None:
    places = [f"run.directory={given}", "data.path=/d", "evaluation.network=~/net.pt"]
    config = with_absolute_paths(load_config("digits", places), inside_job=inside_job)
    assert config.run.directory == found.format(home)
    assert config.evaluation.network == f"{home}/net.pt"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("run.directory=s3://bucket/run", "this machine can open; for checkpoints in a bucket set"),
        ("run.directory=gs://bucket/run", "run.directory is gs://bucket/run, a URL"),
        ("run.directory=https://me:pa55w0rd@host/x", "run.directory is https://***@host/x, a URL"),
        ("run.directory=file://host/x", "names no folder of this host"),
        ("data.cache_directory=s3://bucket/x", "data.cache_directory is s3://bucket/x, a URL"),
        ("run.init_from=s3://bucket/weights", "run.init_from is s3://bucket/weights, a URL"),
        ("run.directory=~no-such-user/x", "there is no such home folder"),
        ("data.path=$NOWHERE/x", "the environment variable NOWHERE is not set"),
    ],
)
def test_what_cannot_be_a_folder_is_refused_by_the_name_of_the_setting(given: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("digits", [given])
    (line,) = refused.value.lines
    assert told in line and line.startswith(f"--set {given.partition('=')[0]}=")


def test_variables_in_urls_are_left_alone() -> None:
    config = load_config("digits", ["data.path=s3://bucket/$NOWHERE", "checkpoint.directory=s3://~/x"])
    assert (config.data.path, config.checkpoint.directory) == ("s3://bucket/$NOWHERE", "s3://~/x")


def test_folder_with_a_colon_is_a_folder_for_settings_that_take_no_url(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    config = load_config("digits", ["run.directory=run:2/x", "data.path=/d"])
    assert with_absolute_paths(config, inside_job=False).run.directory == f"{home}/run:2/x"
    with pytest.raises(ConfigError, match="a relative path: inside a Ray job"):
        with_absolute_paths(config, inside_job=True)


def test_folder_that_exists_is_taken_literally(home: Path) -> None:
    (home / "$NOWHERE").mkdir()
    assert load_config("digits", [f"data.path={home}/$NOWHERE"]).data.path == f"{home}/$NOWHERE"


def test_secret_that_a_written_config_lacks_is_asked_for(tmp_path: Path) -> None:
    url = "data.path=https://***@host/set"
    with pytest.raises(ConfigError, match=r"its secret was left out .* Give the whole value again: --set data.path="):
        load_config("digits", [url])
    assert load_config("digits", [url, "data.path=https://me:pa55w0rd@host/set"]).data.path.endswith("@host/set")
    assert load_config("digits", ["tracking.uri=http://***@host"]).tracking.uri == "http://***@host"


def test_argument_of_a_command_may_begin_with_a_tilde(home: Path) -> None:
    assert path_argument("~/x") == home / "x"
    with pytest.raises(ArgumentTypeError, match="NOWHERE is not set"):
        path_argument("$NOWHERE/x")
