"""The making and moving of MLflow's SQLite file, with a small stand-in for MLflow's tables."""

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from trainer.tracking.database import follow_artifacts, is_half_made, open_database

TABLES = ("experiments (name TEXT, artifact_location TEXT)", "runs (run_uuid TEXT, artifact_uri TEXT)")


class Maker:
    """Makes and checks tables in steps, without any lock, as MLflow does."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, uri: str) -> Path:
        path = Path(uri.removeprefix("sqlite:///"))
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            known = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
            if known and len(known) < 3:
                raise ValueError("table experiments already exists\nand more")
            if not known:
                self.made.append(uri)
                for table in (*TABLES, "alembic_version (version_num TEXT)"):
                    database.execute(f"CREATE TABLE {table}")
        return path


def connected_to(file: Path, maker: Maker | None = None) -> Path:
    return open_database(f"sqlite:///{file}", file, maker or Maker())


def execute(file: Path, *statements: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(file)) as database, database:
        return [row for statement in statements for row in database.execute(statement).fetchall()]


def test_runs_that_start_at_once_make_one_store_under_another_name(tmp_path: Path) -> None:
    maker, file = Maker(), tmp_path / "runs" / "mlflow.db"
    threads = [threading.Thread(target=connected_to, args=(file, maker)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = maker.made
    assert not made.endswith("/mlflow.db")
    assert {path.name for path in file.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    assert execute(file, "SELECT name FROM experiments") == []


def test_empty_file_becomes_a_store(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    assert connected_to(file) == file
    assert len(execute(file, "SELECT name FROM sqlite_master")) == 3


def test_half_made_store_is_set_aside_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mlflow.db"
    execute(file, f"CREATE TABLE {TABLES[0]}")
    connected_to(file)
    (aside,) = tmp_path.glob("mlflow.db.broken-*")
    assert f"{file} was only half made and held no runs: it is now {aside}" in caplog.text
    assert execute(aside, "SELECT name FROM sqlite_master") == [("experiments",)]
    assert len(execute(file, "SELECT name FROM sqlite_master")) == 3


def test_broken_store_with_runs_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    execute(file, *(f"CREATE TABLE {table}" for table in TABLES), "INSERT INTO runs VALUES ('a', 'b')")
    before = file.read_bytes()
    with pytest.raises(RuntimeError, match=r"mlflow.db cannot be used: table experiments already exists. If it is of"):
        connected_to(file)
    assert file.read_bytes() == before


def test_locked_store_is_tried_again_and_left_alone(tmp_path: Path) -> None:
    def locked(uri: str) -> None:
        raise sqlite3.OperationalError("database is locked")

    file = connected_to(tmp_path / "mlflow.db")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        open_database(f"sqlite:///{file}", file, locked)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_files_of_other_programs_are_never_set_aside(tmp_path: Path) -> None:
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("text" * 1000)
    execute(other, "CREATE TABLE customers (name TEXT)")
    assert not is_half_made(text) and not is_half_made(other)


def store_with_a_run(folder: Path, artifacts: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file, location = folder / "mlflow.db", f"{artifacts.as_uri()}/mlartifacts/ddgan"
    if file.exists():
        file.unlink()
    execute(
        file,
        *(f"CREATE TABLE {table}" for table in TABLES),
        f"INSERT INTO experiments VALUES ('ddgan', '{location}'), ('Default', 'mlflow-artifacts:/0'), ('no', NULL)",
        f"INSERT INTO runs VALUES ('a', '{location}/a/artifacts'), ('b', '{location}2/b/artifacts')",
    )
    (artifacts / "mlartifacts" / "ddgan").mkdir(parents=True)
    return file


def locations(file: Path) -> list[str]:
    rows = execute(file, "SELECT artifact_location FROM experiments", "SELECT artifact_uri FROM runs")
    return [row[0] for row in rows]


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_artifacts_follow_a_store_that_was_moved_or_copied(tmp_path: Path, move) -> None:
    file = store_with_a_run(tmp_path / "old", tmp_path / "old")
    before = locations(file)
    follow_artifacts(file)
    assert locations(file) == before
    place = tmp_path / "new place \N{LATIN SMALL LETTER A WITH DIAERESIS}"
    move(tmp_path / "old", place)
    moved = place / "mlflow.db"
    for _ in range(2):
        follow_artifacts(moved)
        root = f"{place.as_uri()}/mlartifacts/ddgan"
        assert "new%20place%20%C3%A4" in root
        assert locations(moved) == [root, "mlflow-artifacts:/0", None, f"{root}/a/artifacts", before[4]]


def test_artifacts_that_were_not_moved_along_stay_where_they_are(tmp_path: Path) -> None:
    file = store_with_a_run(tmp_path / "runs", tmp_path / "big disk")
    before = locations(file)
    follow_artifacts(file)
    assert locations(file) == before
    shutil.rmtree(tmp_path / "big disk")
    follow_artifacts(file)
    assert locations(file)[0] == f"{(tmp_path / 'runs').as_uri()}/mlartifacts/ddgan"
