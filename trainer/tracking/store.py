"""Where the tracking records of a run go, and how to name that place without naming its password."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from trainer.config.sections import TrackingConfig


_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True, kw_only=True)
class Store:
    """A tracking server, or a database that stands for one."""

    uri: str
    """MLflow tracking URI, with the path of a local one absolute. It may hold a password: show `redact(uri)` only."""
    source: Literal["config", "environment", "default"]
    """What named it."""


def choose_store(configured: str | None, run_directory: Path) -> Store:
    """The configured URI, else MLFLOW_TRACKING_URI, else an SQLite file beside the run directory.

    A relative path in the URI starts at the folder that holds the run directory, and not at the current one: that
    differs between the driver and a Ray worker, and both must find the same file.
    """
    beside = Path(os.path.abspath(run_directory)).parent
    if configured:
        return Store(uri=_absolute(configured, beside), source="config")
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return Store(uri=_absolute(named, beside), source="environment")
    return Store(uri=f"sqlite:///{beside / 'mlflow.db'}", source="default")


def tracking_uri(config: "TrackingConfig", run_directory: Path) -> str:
    """MLflow tracking URI of a run; see `choose_store`. Show it through `redact` only."""
    return choose_store(config.uri, run_directory).uri


def artifact_root(uri: str, run_directory: Path) -> Path | None:
    """Folder of artifacts where the store is a bare database, beside it if it is a file; None: the server decides.

    MLflow itself would take `mlruns` in whatever folder is the current one.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.split("+")[0] not in _DATABASES:
        return None
    if scheme.startswith("sqlite"):
        return Path(rest[1:].partition("?")[0]).parent / "mlartifacts"
    return Path(os.path.abspath(run_directory)).parent / "mlartifacts"


def _absolute(uri: str, base: Path) -> str:
    if match := re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!:memory:)([^?]+)(\?.*)?", uri):
        return f"{match[1]}{base / match[2]}{match[3] or ''}"
    if uri.startswith("file:"):
        return (base / unquote(urlsplit(uri).path)).resolve().as_uri()
    if "://" not in uri and uri != "databricks":
        return (base / uri).resolve().as_uri()
    return uri
