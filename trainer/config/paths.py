"""Files and folders that settings name: `~`, `$NAME` and file:// are understood, other URLs where they can work."""

import os
import re

from data.storage.location import DataError, check_names, is_remote, is_url, local_path
from data.storage.paths import expanded
from data.storage.redaction import redact

PATHS = {
    "run.directory": False,
    "run.init_from": False,
    "data.path": True,
    "data.cache_directory": False,
    "checkpoint.directory": True,
    "engine.compile_cache": False,
    "evaluation.network": False,
    "evaluation.reference": True,
}
"""Settings that are the path of a file or folder, and whether it may also be a URL."""


def is_local(name: str, text: str) -> bool:
    """Whether the value of a setting in `PATHS` is a plain path."""
    return not (PATHS[name] and (is_remote(text) or text.lower().startswith("file:")))


def understood(name: str, text: str) -> str:
    """The value of a setting in `PATHS` with its home folder and environment variables filled in.

    A path that exists as it is written is taken literally.

    Raises:
        ValueError: no file can have this name, it is a URL of a setting that takes none, a home folder is unknown, or a
            variable is not set.
    """
    try:
        check_names(text)
    except DataError as error:
        raise ValueError(f"{name} {error}") from error
    if not is_local(name, text) or os.path.exists(text):
        return text
    if re.match(r"(?i)file:", text):
        try:
            return str(local_path(text))
        except DataError as error:
            raise ValueError(f"{name}: {error}") from error
    if is_url(text):
        more = "; for checkpoints in a bucket set checkpoint.directory to its URL" if name == "run.directory" else ""
        raise ValueError(f"{name} is {redact(text)}, a URL: give a file or folder that this machine can open{more}")
    return expanded(text, name)
