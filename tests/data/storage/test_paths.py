"""`~` and `$NAME` in a path mean the same to every command that takes one."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest

from data.prepare.arguments import UsageError, parse_arguments
from data.sources.find import open_source
from data.sources.source import SourceError
from data.storage.location import DataError
from data.storage.paths import location_argument, path_argument, user_cache
from trainer.checkpoint import command as checkpoint
from trainer.config.draft import ConfigError
from trainer.config.io import load_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["~/x", "$HOME/x", "${HOME}/x"])
def test_every_command_fills_in_the_home_folder(home: Path, given: str) -> None:
    filled = f"{home}/x"
    parse: Any = checkpoint._parse
    assert [
        str(path_argument(given)),
        location_argument(given),
        parse_arguments(["inspect", given]).directory,
        parse_arguments(["inspect", "d", "--sheet", given]).sheet,
        parse_arguments(["verify", given]).directory,
        parse(["list", given]).directory,
        parse(["export", "d", "--out", given]).out,
    ] == [filled] * 7
    for source in (given, f"folder:{given}"):
        with pytest.raises(SourceError, match=f"no such file or folder '?{filled}|{filled}: no such"):
            open_source(source)
    with pytest.raises(ConfigError, match=f"{filled}.yaml: cannot be read"):
        load_config(f"{given}.yaml")


def test_a_new_folder_may_not_begin_with_a_tilde_that_the_shell_has_left(home: Path) -> None:
    with pytest.raises(UsageError, match=f"begins with ~; write {home}/x"):
        parse_arguments(["digits", "--out", "~/x"])
    assert parse_arguments(["digits", "--out", "$HOME/x"]).out == f"{home}/x"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("$NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("~no-such-user/x", "there is no such home folder"),
        ("", "'' is given, expected is a path"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(given: str, told: str) -> None:
    with pytest.raises(ArgumentTypeError, match=told):
        location_argument(given)
    with pytest.raises(UsageError, match=told):
        parse_arguments(["verify", given])


def test_what_exists_and_what_is_a_url_is_taken_literally(home: Path) -> None:
    (home / "~").mkdir()
    (home / "a$NOWHERE").mkdir()
    assert (path_argument("~"), path_argument("a$NOWHERE")) == (Path("~"), Path("a$NOWHERE"))
    assert location_argument("s3://bucket/$NOWHERE") == "s3://bucket/$NOWHERE"
    assert location_argument("zero\0byte") == "zero\0byte"


def test_caches_are_in_the_users_folder_and_a_missing_home_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache("sources") == home / ".cache" / "ddgan" / "sources"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert user_cache("sources") == Path("/elsewhere/ddgan/sources")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 12_345_678)
    with pytest.raises(DataError, match="set XDG_CACHE_HOME to a folder"):
        user_cache("sources")
