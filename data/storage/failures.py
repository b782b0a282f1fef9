"""Interprets errors of storage libraries: is a retry useful, and what should the user do?"""

import errno
import http
import socket
import ssl

from data.storage.redaction import redact

_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of this host's disk and memory. Like errors that name a local file, no server causes them."""
_S3_ACCESS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) of an account that may read it, AWS_ENDPOINT_URL "
    "for an S3 service other than Amazon's, or FSSPEC_S3_ANON=true for a public bucket"
)
_CONNECTION = {"OSError", "EOFError", "ClientError", "ConnectionError", "HTTPClientError"}
"""Base classes of the libraries' connection errors."""
_ACCESS = {
    "s3": _S3_ACCESS,
    "s3a": _S3_ACCESS,
    "http": "put user:password@ before the host, or have the folder made readable",
    "https": "put user:password@ before the host, or have the folder made readable",
}
_NETWORK = {
    "s3": "check AWS_ENDPOINT_URL (unset for Amazon's own) and the network",
    "s3a": "check AWS_ENDPOINT_URL (unset for Amazon's own) and the network",
}


class FailureError(Exception):
    """Why a remote file could not be read."""

    def __init__(self, reason: str, *, advice: str = "", passing: bool = False, missing: bool = False) -> None:
        super().__init__()
        self.reason = reason
        """What happened, briefly."""
        self.advice = advice or ("try again later" if passing else "check the URL")
        """What the user can do."""
        self.passing = passing
        """Whether a retry may help."""
        self.missing = missing
        """Whether the server reports that the file is missing."""

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}"


def explain(error: Exception, protocol: str) -> FailureError | None:
    """Classify an error of fsspec or its libraries; None if this host caused it, not the storage."""
    # Libraries wrap errors; fsspec's http wraps any error in a FileNotFoundError. The cause tells more.
    chain = _chain(error)
    if any(isinstance(link, OSError) and (link.errno in _LOCAL or link.filename) for link in chain):
        return None
    access = _ACCESS.get(protocol, f"check the credentials for {protocol}://")
    network = _NETWORK.get(protocol, "check the address and the network")
    status = next(filter(None, map(_http_status, chain)), None)
    refused = any(isinstance(link, PermissionError) for link in chain)
    if status in (401, 403, 407) or (refused and status is None) or (refused and status == 400):
        return FailureError(f"permission denied{f' (HTTP {status})' if status else ''}{_code(chain)}", advice=access)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError) and not _is_connection(chain)):
        what = "there is no such bucket" if "NoSuchBucket" in _code(chain) else "there is no such file"
        advice = "check the URL; all files of the prepared folder belong there"
        return FailureError(f"{what}{f' (HTTP {status})' if status else ''}", advice=advice, missing=True)
    if status is not None:
        timed_out = any(isinstance(link, TimeoutError) for link in chain)
        passing = timed_out or status in (408, 425, 429) or status >= 500
        return FailureError(f"HTTP {status} {_phrase(status)}{_code(chain)}", passing=passing)
    for link in chain:
        if isinstance(link, socket.gaierror):
            passing = link.errno == socket.EAI_AGAIN
            return FailureError(
                f"the host's name cannot be resolved ({link.strerror})", advice=network, passing=passing
            )
        if isinstance(link, ssl.SSLError):
            return FailureError(f"no secure connection ({link.reason or link})", advice="check the host's certificate")
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
        return FailureError("there are no credentials", advice=access)
    if any(isinstance(link, TimeoutError) for link in chain) or names & {"ConnectTimeoutError", "ReadTimeoutError"}:
        return FailureError("no answer in time", advice=network, passing=True)
    if any(isinstance(link, ConnectionRefusedError) for link in chain):
        return FailureError("the connection was refused", advice=network, passing=True)
    if names & {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError"}:
        return FailureError("the answer was cut short", passing=True)
    # A ValueError is about a library's arguments, such as an invalid URL.
    if names & _CONNECTION and not any(isinstance(link, ValueError) for link in chain):
        return FailureError(f"the connection failed ({_summary(chain[-1])})", advice=network, passing=True)
    # The remaining botocore errors concern profiles, regions and the like.
    return FailureError(_summary(error), advice=access if "BotoCoreError" in names else "")


def _is_connection(chain: list[BaseException]) -> bool:
    """Whether a link is about the way to the storage, and not about a file."""
    others = [link for link in chain if not isinstance(link, FileNotFoundError)]
    kinds = {kind.__name__ for link in others for kind in type(link).__mro__}
    return bool(kinds & _CONNECTION)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        # botocore keeps the cause as an argument.
        below = getattr(link, "kwargs", {}).get("error") if isinstance(getattr(link, "kwargs", {}), dict) else None
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        link = link or (below if isinstance(below, BaseException) else None)
    return chain


def _http_status(error: BaseException) -> int | None:
    """HTTP status as stored by aiohttp, botocore, requests and Google's libraries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        places = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    elif type(error).__module__ == "aiohttp.http_exceptions":
        # Its parser reports 400 for truncated answers.
        places = []
    else:
        names = ("status", "status_code", "code")
        places = (getattr(place, name, None) for place in (error, response) for name in names)
    return next((value for value in places if isinstance(value, int) and 300 <= value < 600), None)


def _code(chain: list[BaseException]) -> str:
    """S3's error code, if it is a word and not the number."""
    for link in chain:
        response = getattr(link, "response", None)
        code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
        if code and not code.isdigit():
            return f" {code}"
    return ""


def _phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase if status in http.HTTPStatus._value2member_map_ else ""


def _summary(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))  # before truncation: half a URL is not recognized
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
