"""Chooses where the tracking records of a run are sent, and refuses what the trackers could not use."""

import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from data.storage.errors import UserError
from data.storage.paths import expanded
from data.storage.redaction import HIDDEN, redact
from trainer.tracking.spool import uploader_folder

if TYPE_CHECKING:
    from trainer.config.sections import TrackingConfig

VARIABLE = "MLFLOW_TRACKING_URI"
LIBRARIES = {"mlflow": "mlflow", "tensorboard": "tensorboardX", "wandb": "wandb"}
"""The Python package that each tracker needs."""
_INSTALL = {"wandb": "pip install '.[wandb]'"}
_SERVERS = ("http", "https")
_DRIVERS = {
    "sqlite": {"": "sqlite3", "pysqlite": "sqlite3"},
    "postgresql": {"": "psycopg2", "psycopg2": "psycopg2", "psycopg": "psycopg", "pg8000": "pg8000"},
    "mysql": {"": "MySQLdb", "mysqldb": "MySQLdb", "pymysql": "pymysql", "mysqlconnector": "mysql"},
    "mssql": {"": "pyodbc", "pyodbc": "pyodbc", "pymssql": "pymssql"},
}
"""Databases that MLflow can use, and the Python package of each driver."""
_OTHERS = ("databricks", "databricks-uc", "uc")
_ALLOWED = (
    "http(s)://host:port, sqlite:///file.db, postgresql:// and other databases of MLflow, and a folder "
    "(./folder or file:///folder)"
)


class TrackingError(UserError):
    """A tracker or its URI cannot be used; the message says which, why, and what to write instead."""

    def __init__(self, message: str) -> None:
        # A password with a blank in it makes no URL, so that `redact` would not see where it ends.
        super().__init__(re.sub(r"(?<=://)(?!\*\*\*@)\S*:[^@/]*@", f"{HIDDEN}@", message))


@dataclass(frozen=True, kw_only=True)
class Store:
    """A tracking server, or a local database or folder used as one."""

    uri: str
    """Tracking URI, with the path of a local one made absolute. May contain a password: show only `redact(uri)`."""
    source: Literal["config", "environment", "default"]
    """Where the URI comes from."""
    given: str | None
    """The URI as the config or the environment has it."""


def choose_store(configured: str | None, run_directory: Path, *, name: str = "tracking.uri") -> Store:
    """The configured URI, else MLFLOW_TRACKING_URI, else an SQLite file next to the run directory.

    A relative path in the URI starts at the parent of the run directory, not at the current folder: that differs
    between the driver and a Ray worker, and both must find the same file.

    Args:
        configured: the configured URI. If a run wrote it to a file, its password is left out; it is then taken from
            the environment: from MLFLOW_TRACKING_URI, or by MLflow itself from its variables for user and password.
        run_directory: folder of the run.
        name: what the user calls the configured URI, for messages.

    Raises:
        TrackingError: MLflow cannot use the URI, or its password is missing.
    """
    base = Path(os.path.abspath(run_directory)).parent
    named = os.environ.get(VARIABLE, "").strip()
    if configured:
        given = configured.strip()
        if HIDDEN in given:
            given = named if redact(named) == given else _without_user(given, name)
        return Store(uri=_checked(given, base, name), source="config", given=configured)
    if named:
        return Store(uri=_checked(named, base, VARIABLE), source="environment", given=named)
    return Store(uri=f"sqlite:///{base / 'mlflow.db'}", source="default", given=None)


def tracker_uri(backend: str, store: Store | None, run_directory: Path) -> str:
    """Where a tracker keeps a run: a URI or a folder. Show it only through `redact`.

    Args:
        backend: the tracker.
        store: see `choose_store`; not needed for a tracker that `tracking.uri` does not steer.
        run_directory: folder of the run.
    """
    directory = Path(os.path.abspath(run_directory))
    if backend == "tensorboard":
        return str(directory / "tensorboard")
    if backend == "wandb":
        if os.environ.get("WANDB_MODE", "online") != "online":
            return str(uploader_folder(directory, backend))
        return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    assert store is not None, backend
    return store.uri


def has_store(backends: Iterable[str]) -> bool:
    """Whether `tracking.uri` says where one of these trackers is."""
    return any(backend not in ("tensorboard", "wandb") for backend in backends)


def tracker_uris(config: "TrackingConfig", run_directory: Path) -> dict[str, str]:
    """Where each tracker of a run is, by name; see `tracker_uri`."""
    store = choose_store(config.uri, run_directory) if has_store(config.backends) else None
    return {backend: tracker_uri(backend, store, run_directory) for backend in config.backends}


def check_trackers(config: "TrackingConfig", run_directory: Path) -> None:
    """Refuse trackers that cannot work, before anything is started.

    Raises:
        TrackingError: the library of one is missing; or see `check_store`.
    """
    for backend in config.backends:
        check_library(backend)
    check_store(config, run_directory)


def check_library(backend: str) -> None:
    """Refuse a tracker whose library is not installed, with a TrackingError."""
    library = LIBRARIES.get(backend)
    spec = library and importlib.util.find_spec(library)
    if library and not (spec and spec.origin):  # a folder `wandb`, as W&B makes, is found as a package without a file
        raise TrackingError(
            f"the tracker {backend} needs the Python package {library}, which is not installed here: "
            f"{_INSTALL.get(backend, f'pip install {library}')}, or take {backend} out of tracking.backends"
        )


def check_store(config: "TrackingConfig", run_directory: Path) -> None:
    """Refuse a tracking URI of MLflow that cannot work.

    Raises:
        TrackingError: see `choose_store`; or the URI names a file that is no database.
    """
    if not has_store(config.backends):
        return
    uri = choose_store(config.uri, run_directory).uri
    file = database_file(uri)
    if file is None:
        return
    if file.is_dir():
        raise TrackingError(
            f"the tracking URI is {uri}, which names a folder: name a file in it, or write ./{file.name}"
        )
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
    except OSError:  # it does not exist yet, or the uploader will say why it cannot be read
        return
    if start and not start.startswith(b"SQLite format 3"):
        raise TrackingError(
            f"the tracking URI is {uri}, but that file is no SQLite database: give another file, or move it away and "
            "a new one is made"
        )


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for others."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(\?.*)?", uri)
    return Path(match[1]) if match else None


def secrets_of(uri: str) -> tuple[str, ...]:
    """What must not be shown of a tracking URI and of the trackers' variables: passwords, tokens and keys."""
    user = urlsplit(uri).netloc.rpartition("@")[0] if "://" in uri else ""
    password = user.partition(":")[2] or user
    names = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY")
    given = [os.environ.get(name, "") for name in names]
    return tuple({secret for secret in (password, unquote(password), *given) if secret})


def _without_user(given: str, name: str) -> str:
    """The URI without the place of its user and password, which MLflow takes from the environment."""
    known = [bool(os.environ.get(f"MLFLOW_TRACKING_{part}")) for part in ("USERNAME", "PASSWORD", "TOKEN")]
    if given.startswith(_SERVERS) and (all(known[:2]) or known[2]):
        return given.replace(f"{HIDDEN}@", "")
    raise TrackingError(
        f"{name} is {given}: its password is kept in no file. Set {VARIABLE} to the whole URI, or "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    )


def _checked(uri: str, base: Path, name: str) -> str:
    """The URI with an absolute path.

    Raises:
        TrackingError: MLflow cannot use it.
    """
    scheme, colon, rest = uri.partition(":")
    if not uri.isprintable() or uri[0] in "\"'" or "\\" in scheme:
        raise TrackingError(
            f"{name} is {uri!r}: it holds quotes or characters that cannot be printed; allowed are {_ALLOWED}"
        )
    if uri in _OTHERS:
        return uri
    if scheme.lower() == "file":
        return _folder_of(uri, base, name)
    if scheme.lower().partition("+")[0] == "sqlite" and colon:
        return _sqlite(uri, base, name)
    if not rest.startswith("//"):
        return _folder(uri, base, name)
    scheme = scheme.lower()
    if scheme in _OTHERS or importlib.metadata.entry_points(group="mlflow.tracking_store", name=scheme):
        return uri
    dialect, _, driver = scheme.partition("+")
    if scheme not in _SERVERS and dialect not in _DRIVERS:
        near = difflib.get_close_matches(scheme, (*_SERVERS, *_DRIVERS), n=1)
        guess = f" (did you mean {near[0]}:{rest}?)" if near else ""
        raise TrackingError(f"{name} is {uri}: MLflow knows no {scheme}://{guess}. Allowed are {_ALLOWED}")
    _check_host(uri, name)
    package = _DRIVERS.get(dialect, {}).get(driver)
    if package and importlib.util.find_spec(package) is None:
        raise TrackingError(f"{name} is {uri}: it needs the Python package {package}, which is not installed here")
    return uri


def _check_host(uri: str, name: str) -> None:
    try:
        parts = urlsplit(uri)
        if parts.scheme in _SERVERS and not parts.hostname:
            raise ValueError("it names no host")
        if re.search(r"\s", uri):
            raise ValueError("it holds a blank; in a password write it as %20")
        try:
            _ = parts.port  # reading it checks it
        except ValueError:  # its text may hold a part of the password
            raise ValueError("its port is no number up to 65535; in a password write / as %2F and @ as %40") from None
    except ValueError as error:
        raise TrackingError(f"{name} is {uri}: {error}. Write it as {uri.partition(':')[0]}://host:port") from error


def _sqlite(uri: str, base: Path, name: str) -> str:
    match = re.fullmatch(r"(?i)(sqlite(?:\+\w+)?):(/*)([^?]*)(\?.*)?", uri)
    if not match or not match[3].strip("/") or match[3] == ":memory:":
        raise TrackingError(f"{name} is {uri}: it names no file, so nothing would be kept. Write sqlite:///mlflow.db")
    if len(match[2]) < 3:
        raise TrackingError(
            f"{name} is {uri}: write sqlite:///{match[3]} for a file next to the run, or four slashes "
            "before an absolute path"
        )
    file = base / _filled(match[2][3:] + match[3], name)
    return f"{match[1].lower()}:///{file}{match[4] or ''}"


def _folder_of(uri: str, base: Path, name: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise TrackingError(f"{name} is {uri}: it names no folder of this host. Write file:///folder, or ./folder")
    return (base / _filled(unquote(parts.path), name)).resolve().as_uri()


def _folder(text: str, base: Path, name: str) -> str:
    """A folder given as a path. What looks like a host is refused: MLflow would make a folder of that name."""
    path = Path(_filled(text, name))
    first = text.partition("/")[0]
    is_path = path.is_absolute() or first in (".", "..") or (base / path).is_dir()
    if not is_path and re.search(r"[.:]|//", text):
        guess = re.sub(r"(?i)^https?:?/*", "", text)
        raise TrackingError(f"{name} is {text}: did you mean http://{guess}? For a folder of that name write ./{text}")
    return (base / path).resolve().as_uri()


def _filled(path: str, name: str) -> str:
    try:
        return expanded(path, name)
    except ValueError as error:
        raise TrackingError(str(error)) from error
