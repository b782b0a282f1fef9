"""Chooses where the tracking records of a run are sent."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from trainer.config.sections import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Store:
    """A tracking server, or a local database or folder used as one."""

    uri: str
    """Tracking URI, with the path of a local one made absolute. May contain a password: show only `redact(uri)`."""
    source: Literal["config", "environment", "default"]
    """Where the URI comes from."""


def choose_store(configured: str | None, run_directory: Path) -> Store:
    """The configured URI, else MLFLOW_TRACKING_URI, else an SQLite file next to the run directory.

    A relative path in the URI starts at the parent of the run directory, not at the current folder: that differs
    between the driver and a Ray worker, and both must find the same file.
    """
    base = Path(os.path.abspath(run_directory)).parent
    if configured:
        return Store(uri=_absolute(configured, base), source="config")
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return Store(uri=_absolute(named, base), source="environment")
    return Store(uri=f"sqlite:///{base / 'mlflow.db'}", source="default")


def tracking_uri(config: "TrackingConfig", run_directory: Path) -> str:
    """Tracking URI of a run; see `choose_store`. Show it only through `redact`."""
    return choose_store(config.uri, run_directory).uri


def _absolute(uri: str, base: Path) -> str:
    if match := re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!:memory:)([^?]+)(\?.*)?", uri):
        return f"{match[1]}{base / match[2]}{match[3] or ''}"
    if uri.startswith("file:"):
        return (base / unquote(urlsplit(uri).path)).resolve().as_uri()
    if "://" not in uri and uri != "databricks":
        return (base / uri).resolve().as_uri()
    return uri
