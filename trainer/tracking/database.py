"""MLflow's SQLite file: made once however many runs start, a half-made one set aside, artifacts where the file lies.

MLflow itself makes its tables in many steps without a lock. Two processes that do so at once, or one that is killed,
leave a file that no version of MLflow can open.
"""

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

T = TypeVar("T")

log = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"
"""Folder next to the database that holds its artifacts."""
_WAIT_S = 20.0  # for other writers, as MLflow waits


def open_database(uri: str, file: Path, connect: Callable[[str], T]) -> T:
    """Connect to the database, making it if it is missing.

    Args:
        uri: its tracking URI.
        file: its file; the folder is made as well.
        connect: connects to a URI, and makes or checks the tables.

    Raises:
        RuntimeError: the database holds runs, but cannot be used.
        Exception: whatever `connect` raises for other reasons.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        if not file.exists() or not file.stat().st_size:
            _make(file, connect)
        try:
            connected = connect(uri)
        except Exception as error:
            if "locked" in str(error):
                raise
            if not is_half_made(file):
                raise RuntimeError(
                    f"{file} cannot be used: {_first_line(error)}. If it is of another version of MLflow, `mlflow db "
                    f"upgrade {uri}` may help. If it is damaged, move it away: what the runs' spools hold "
                    "is sent to a new one by `python -m trainer.tracking deliver --run DIR`"
                ) from error
            aside = file.with_name(f"{file.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
            file.rename(aside)
            log.warning("%s was only half made and held no runs: it is now %s, and a new one is made", file, aside)
            _make(file, connect)
            connected = connect(uri)
        follow_artifacts(file)
    return connected


def is_half_made(file: Path) -> bool:
    """Whether MLflow began to make its tables in the file, and no run was ever stored in it."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and not tables & {"experiments", "alembic_version"}:
                return False  # the database of another program
            return "runs" not in tables or database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is None
    except sqlite3.Error:  # damaged, locked, or no database
        return False


def follow_artifacts(file: Path) -> None:
    """Correct where the artifacts of the database are, if the database and the folder next to it were moved or copied.

    MLflow stores absolute locations, so it would write to the former place. Locations in other folders, and those whose
    files are still there only, stay as they are.
    """
    here = file.parent / ARTIFACTS
    with closing(sqlite3.connect(file, timeout=_WAIT_S)) as database, database:
        for (location,) in database.execute("SELECT artifact_location FROM experiments").fetchall():
            root, found, rest = (location or "").rpartition(f"/{ARTIFACTS}/")
            if not found or not root.startswith("file:") or f"{root}/{ARTIFACTS}" == here.as_uri():
                continue
            former, now = Path(unquote(urlsplit(location).path)), here / unquote(rest)
            if former.exists() and not now.exists():
                continue
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR "
                    f"substr({column}, 1, ?) = ?",
                    (now.as_uri(), len(location) + 1, location, len(location) + 1, f"{location}/"),
                )
            log.info("artifacts of %s are now in %s, formerly in %s", file, now, former)


def _make(file: Path, connect: Callable[[str], object]) -> None:
    """Make the database under another name first, so that nobody sees or keeps half of it."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    try:
        connect(f"sqlite:///{draft}")
        if file.exists() and not file.stat().st_size:
            file.unlink()
        # Fails if another process has made it, where the file system ignores locks.
        with suppress(FileExistsError):
            os.link(draft, file)
    except (PermissionError, NotImplementedError):  # a file system without hard links
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of the database's set-up; where locks do not work, hold nothing."""
    with (file.parent / f".{file.name}.lock").open("a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
