"""Makes this process's environment fit for Ray, or refuses it, before Ray is touched. Imports nothing of Ray.

Ray itself waits for a quarter of an hour for an address where nothing answers, and names neither the setting nor its
value when its folder cannot hold its sockets.
"""

import logging
import os
import re
import secrets
import socket
import sys
import tempfile
from pathlib import Path

from data.processes.sockets import LONGEST_FOLDER
from data.storage.errors import UserError
from data.storage.redaction import redact

log = logging.getLogger(__name__)

ANSWER_S = 5.0
"""Longest wait for a connection to RAY_ADDRESS, and for an answer there."""
_SETTINGS, _FRAME_HEAD_BYTES = 4, 9
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0))
"""What an HTTP/2 client sends first, with a SETTINGS frame that changes nothing. Ray's head speaks gRPC over HTTP/2."""
_LONGEST_SOCKET = 107
"""Bytes in the path of a Unix socket, on Linux."""
_IN_RAY_FOLDER = len("/ray/session_2026-11-28_11-47-23_123456_4194304/sockets/plasma_store")
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
_LOOPBACK = "127.0.0.1,localhost"


def set_up_ray() -> None:
    """Set the environment variables that Ray reads when it is imported.

    Raises:
        UserError: RAY_ADDRESS or RAY_TMPDIR cannot be used.
    """
    if os.environ.get("RAY_ADDRESS") == "local":
        del os.environ["RAY_ADDRESS"]
    if address := os.environ.get("RAY_ADDRESS"):
        check_ray_address(address)
    else:
        # We start our own Ray. Anybody who can reach it can run code as this user, so it needs a token even locally.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # It watches for nodes that a cloud takes back, and each worker group would wait for its start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ["RAY_TMPDIR"] = folder = ray_folder()
        if len(os.fsencode(os.environ.get("TMPDIR", ""))) > LONGEST_FOLDER:
            log.warning("TMPDIR is too long for the sockets of Ray's processes; they take %s instead", folder)
            os.environ["TMPDIR"] = folder
        for name in ("no_proxy", "NO_PROXY"):  # its processes talk to each other over HTTP too
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), _LOOPBACK)))
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # Ray reads its processes' output as UTF-8
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # show every line of a rank at once
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape sequences in files
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU ranks still see the GPUs


def ray_folder() -> str:
    """The folder in which a Ray of our own keeps its sockets and logs, as RAY_TMPDIR.

    That is RAY_TMPDIR itself, else the first of TMPDIR, /tmp, /var/tmp and /dev/shm that fits.

    Raises:
        UserError: RAY_TMPDIR does not fit; or nothing does.
    """
    advice = f"Set RAY_TMPDIR to a folder that you can write, with a path of at most {_longest_folder()} bytes"
    if given := os.environ.get("RAY_TMPDIR"):
        if problem := _folder_problem(given):
            raise UserError(f"RAY_TMPDIR is {given}, {problem}. {advice}, or unset it")
        return given
    for place in filter(None, (os.environ.get("TMPDIR"), *_PLACES)):
        if not _folder_problem(place):
            return place
    raise UserError(f"Ray finds no folder for its sockets and logs: {', '.join(_PLACES)} do not fit. {advice}")


def _longest_folder() -> int:
    return _LONGEST_SOCKET - _IN_RAY_FOLDER


def _folder_problem(folder: str) -> str:
    if len(os.fsencode(os.path.realpath(folder))) > _longest_folder():
        return "a path too long for the Unix sockets in it"
    if not os.path.isabs(folder):
        return "a relative path"
    try:
        (Path(folder) / "ray").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(folder) / "ray"):
            pass
    except OSError as error:
        return f"which cannot be used: {error.strerror}"
    return ""


def check_ray_address(address: str) -> None:
    """Refuse an address at which no Ray answers; Ctrl-C ends the wait.

    Raises:
        UserError: says what is wrong with RAY_ADDRESS, and what to do.
    """
    advice = "Give the host:port of a running Ray, or unset RAY_ADDRESS to have a Ray started on this machine"
    if "://" in address:
        what = "the address of a Ray client server" if address.startswith("ray://") else "a URL"
        raise UserError(f"RAY_ADDRESS is {redact(address)}, {what}, which cannot be used. {advice}")
    if address == "auto":
        return
    parts = re.fullmatch(r"\[?([^\[\]]+)\]?:(\d{1,5})", address)
    if not parts or not 0 < int(parts[2]) < 2**16:
        raise UserError(f"RAY_ADDRESS is {address}, which is no host:port. {advice}")
    try:
        with socket.create_connection((parts[1], int(parts[2])), timeout=ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(connection):
                raise UserError(f"RAY_ADDRESS is {address}, but what answers there is not Ray. {advice}")
    except TimeoutError:
        reason = f"no Ray answers within {ANSWER_S:g} s"
        raise UserError(f"RAY_ADDRESS is {address}, but {reason}. {advice}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"RAY_ADDRESS is {address}, but nothing answers there: {reason}. {advice}") from None


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side begins as an HTTP/2 server does, with a SETTINGS frame (RFC 9113, 3.4 and 4.1)."""
    connection.sendall(_HTTP2_PREFACE)
    head = b""
    while len(head) < _FRAME_HEAD_BYTES and (more := connection.recv(_FRAME_HEAD_BYTES - len(head))):
        head += more
    return len(head) == _FRAME_HEAD_BYTES and head[3] == _SETTINGS
