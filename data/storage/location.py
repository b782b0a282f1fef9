"""Location of a prepared data set: a local folder, or a URL that fsspec can read. Neither runs a shell."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec

from data.storage.errors import UserError
from data.storage.redaction import redact

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_LONGEST_NAME = 255
_LONGEST_PATH = 3800
"""Bytes. Linux allows 4095, and a run adds the names of its own files and folders."""
_NO_STORAGE = {
    "asynclocal",
    "async_wrapper",
    "asyncwrapper",
    "blockcache",
    "cached",
    "data",
    "dir",
    "file",
    "filecache",
}
_NO_STORAGE |= {"generic", "libarchive", "local", "pyscript", "reference", "simplecache", "tar", "zip"}
"""Protocols of fsspec that wrap others, or that cannot hold a folder of shards."""


def is_url(text: str) -> bool:
    """Whether the text begins with a scheme and //, file:// included."""
    scheme = _SCHEME.match(text)
    return scheme is not None and text.startswith("//", scheme.end())


def is_remote(path: str | Path) -> bool:
    """Whether the text is a URL (s3://..., https://..., ...) or looks like one; file:// and folders are local."""
    scheme = _SCHEME.match(path) if isinstance(path, str) else None
    return scheme is not None and scheme[1].lower() != "file"


def local_path(path: str | Path) -> Path:
    """The absolute folder of a path or a file:// URL.

    Raises:
        DataError: the URL names another host, or a relative folder.
    """
    if not (isinstance(path, str) and path.lower().startswith("file:")):
        return Path(path).absolute()
    try:
        parts = urlsplit(path)
    except ValueError:  # a bracket that is no part of an IPv6 address
        raise DataError(f"{path} is not a URL: write file:///absolute/folder, or the plain path") from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise DataError(f"{path} names no folder of this host: write file:///absolute/folder, or the plain path")
    return Path(unquote(parts.path))


def check_names(path: str) -> None:
    """Refuse a path or URL that no file can have, before anything is looked for.

    Raises:
        DataError: it is empty or too long, or has too long a name in it.
    """
    if not path:
        raise DataError("is empty: give a path")
    for name in path.split("/"):
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise DataError(
                f"has a part of {len(os.fsencode(name))} bytes, more than the {_LONGEST_NAME} of a file name"
            )
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise DataError(
            f"has {len(os.fsencode(path))} bytes: at most {_LONGEST_PATH}, since longer names follow below it"
        )
    try:
        urlsplit(path if is_url(path) else "")
    except ValueError:  # a bracket that is no part of an IPv6 address
        raise DataError(
            f"is {path}, which is not a URL: write a plain path, or a URL such as s3://place/folder"
        ) from None


def checked_url(url: str) -> str:
    """The URL of a remote folder, without trailing slashes and with a lower-case protocol.

    Raises:
        DataError: not a URL, chained, or unknown storage.
    """
    shown = redact(url if "://" in url else re.sub(r".*:.*@", "***@", url, flags=re.DOTALL))
    shown = shown if url.isprintable() else repr(shown)
    scheme = _SCHEME.match(url)
    protocol = scheme[1].lower() if scheme else ""
    colon, rest = url[len(protocol) :][:3], url[len(protocol) + 3 :].rstrip("/")
    allowed = "allowed are a local folder, http(s)://, s3://, gs:// and other storage that fsspec knows"
    if "::" in url:
        raise DataError(f"{shown}: chained URLs are not read; {allowed}")
    if protocol not in fsspec.available_protocols() or protocol in _NO_STORAGE:
        raise DataError(f"{shown}: {protocol}: is no storage; {allowed}. Write ./ before a folder of that name")
    if colon != "://" or not rest or rest.startswith("/") or not url.isprintable():
        raise DataError(f"{shown}: not a URL of the form {protocol}://place/folder")
    if protocol in ("http", "https") and re.search(r"[?#]", rest):
        shown = re.split(r"[?#]", shown)[0]
        raise DataError(f"{shown}: a URL with ? or # is not read, since the names of files are added at its end")
    return f"{protocol}://{rest}"


class DataError(UserError):
    """Data cannot be used; the message names shard and key or file, and says what to do."""
