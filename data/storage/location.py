"""Where a prepared data set is: a local folder, or a URL that fsspec can read. No shell is run for either."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


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
"""Protocols of fsspec that wrap others, or that name no place where a folder of shards could be."""


def is_url(text: str) -> bool:
    """Whether the text begins as a URL with a place does, file:// included."""
    scheme = _SCHEME.match(text)
    return scheme is not None and text.startswith("//", scheme.end())


def is_remote(path: str | Path) -> bool:
    """Whether the text is a URL (s3://..., https://..., ...) or looks like one; file:// and folders are local."""
    scheme = _SCHEME.match(path) if isinstance(path, str) else None
    return scheme is not None and scheme[1].lower() != "file"


def local_path(path: str | Path) -> Path:
    """The absolute folder that a path or a file:// URL names.

    Raises:
        DataError: the URL names a folder of another host, or no absolute one.
    """
    if not (isinstance(path, str) and path.lower().startswith("file:")):
        return Path(path).absolute()
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise DataError(f"{path} names no folder of this host: write file:///absolute/folder, or the plain path")
    return Path(unquote(parts.path))


def checked_url(url: str) -> str:
    """The URL of a remote folder without trailing slashes, its protocol in lower case.

    Raises:
        DataError: it is no URL, chained, or of no known storage.
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


_HOST_AND_PORT = r"(?:[^/?\#\s:@]*@)?(?:localhost|[\w-]+\.[\w.-]+|\[[\da-f:.]+\]):\d{1,5}(?:[/?\#\s]|$)"


_USER = re.compile(
    rf"""(?ix)
    (?<=://) (?:
        (?!{_HOST_AND_PORT}) [^/?\#\s:]* : \S* @  # user:password@; people write / ? \# and @ in it as they are
        | [^/?\#\s]* @                            # token@, me@company:password@
    )
    | (?<=%3a%2f%2f) (?: (?:(?!%2f|%3a)[^/\s&])* %3a [^\s&]* | (?:(?!%2f)[^/\s&])* ) %40  # in a URL in a URL
    | (?:(?<=\bhttp:)|(?<=\bhttps:)|(?<=\bs3:)) (?:/|///)? [^/?\#\s:@]+ : \S+ @  # too few or too many slashes
    """
)
"""What comes before a host. A raw slash in a password makes the URL invalid, which is shown to the user all the same;
therefore a short name with a number, as in `mlflow:5000/a@b`, counts as a user and not as a host with its port."""


_SECRET_FIELDS = re.compile(
    r"""(?ix)
    (?P<name>
        (?:
            password|passwd|passphrase|pwd|secret|token|credential|signature
            | (?:api|access|account|auth|client|encryption|private|secret|shared)[_-]?key
            | (?<=[?&\#;]) (?:auth|code|key|pass|pw|sig)
        )
        (?: = | ["']\s*:\s*(?=["']) )
        | \b authorization ["']? \s*[:=]\s* ["']? (?:basic|bearer)\s+
    )
    (?: "[^"]*" | '[^']*' | (?: [^&\s"':,;.)] | [:,;.)](?![:,;.)]*(?:\s|$)) | ["'](?=[^\s"',;:)\]}>]) )+ )
    """
)
"""name=value of a query, of a database's connection string or of an environment, 'name': 'value', and HTTP's header."""


_ENCODED_FIELDS = re.compile(r"(?i)((?:password|secret|token|credential|signature|key|sig)%3d)(?:(?!%26)[^&\s'\"])+")


def _hidden(user: re.Match[str]) -> str:
    return "***%40" if user[0].endswith("%40") else "***@"


def redact(text: str) -> str:
    """The text with what may be secret in it replaced by ***: users and passwords of URLs, and secret fields.

    Works on a URL as on a message with several. In doubt more is hidden: up to the last @ without a blank before it,
    where a password begins. Text without such a URL or field comes back as it is; so does what this function gave.
    """
    text = _USER.sub(_hidden, text)
    return _ENCODED_FIELDS.sub(r"\1***", _SECRET_FIELDS.sub(r"\g<name>***", text))


def redact_values(values: Any) -> Any:
    """A structure of dicts and lists, as JSON has them, with each text in it redacted."""
    if isinstance(values, dict):
        return {key: redact_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values


class DataError(ValueError):
    """Data that cannot be used; the message names shard and key or file, and what to do. It shows no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))
