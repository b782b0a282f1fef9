"""Asks the tracking server whether it is there, is an MLflow server, and lets this run in."""

import base64
import configparser
import http.client
import netrc
import os
import socket
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.storage.redaction import redact
from trainer.tracking.store import TrackingError, database_file

_ANSWER_S = 5.0
_HELP = "Start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or set tracking.backends=[]"


def ask_store(uri: str) -> str:
    """Ask the store of a valid tracking URI; returns what to show.

    Raises:
        TrackingError: it cannot take a run; says why, and what to do.
    """
    shown = redact(uri)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        _ask_server(uri, shown)
        return f"{shown} answers"
    if file := database_file(uri):
        folder = next(folder for folder in file.parents if folder.exists())
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise TrackingError(f"{shown} cannot be written. Give another file as tracking.uri, or correct its rights")
    elif parts.hostname and parts.port:  # a database server
        try:
            socket.create_connection((parts.hostname, parts.port), _ANSWER_S).close()
        except OSError as error:
            raise TrackingError(f"{shown} does not answer: {error}. {_HELP}") from error
    return shown


def _user(uri: str) -> tuple[str, str]:
    """User and password that MLflow's client would use: of the URI, its variables, its file, or ~/.netrc."""
    parts = urlsplit(uri)
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    stored = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, configparser.Error, UnicodeDecodeError):
        stored.read(Path("~/.mlflow/credentials").expanduser())
    user, password = (
        os.environ.get(f"MLFLOW_TRACKING_{name}")
        or stored.get("mlflow", f"mlflow_tracking_{name.lower()}", fallback="")
        for name in ("USERNAME", "PASSWORD")
    )
    if not (user and password) and not os.environ.get("MLFLOW_TRACKING_TOKEN"):
        with suppress(OSError, netrc.NetrcParseError):
            if known := netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or ""):
                return known[0], known[2]
    return user, password


def _ask_server(uri: str, shown: str) -> None:
    parts = urlsplit(uri)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    place = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "") + parts.path.rstrip("/")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    user = _user(uri)
    request = urllib.request.Request(f"{place}/api/2.0/mlflow/experiments/search?max_results=1")
    if all(user):
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(user).encode()).decode()}")
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    context = None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context = ssl._create_unverified_context()
    elif bundle := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        context = ssl.create_default_context(cafile=bundle)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S, context=context) as answer:
            if "json" not in answer.headers.get("Content-Type", ""):
                raise TrackingError(f"{shown} answers, but not as MLflow does: it is another server. {_HELP}")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            if any(os.environ.get(f"MLFLOW_TRACKING_{way}") for way in ("AUTH", "AWS_SIGV4")):
                return  # MLflow logs in by a plugin
            given = (
                "refuses the user and password that it was given"
                if request.has_header("Authorization")
                else "asks for a user"
            )
            raise TrackingError(
                f"{shown} {given} ({error.code}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN"
            ) from error
        if error.code == 404:
            raise TrackingError(
                f"{shown} answers, but not as MLflow does (404): check host, port and path. {_HELP}"
            ) from error
        raise TrackingError(f"{shown} answers with an error ({error.code} {error.reason}): look at its log") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise TrackingError(f"{shown} does not answer: {str(reason).strip()}. {_HELP}") from error
