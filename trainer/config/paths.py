"""Files and folders that settings name: `~`, `$NAME` and file:// are understood, other URLs where they can work."""

import argparse
import os
import re
from pathlib import Path

from data.storage.location import DataError, check_names, is_remote, is_url, local_path
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
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)


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


def expanded(text: str, name: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` filled in.

    Raises:
        ValueError: a home folder is unknown, or a variable is not set.
    """
    filled = os.path.expanduser(text)
    if re.match(r"~[\w.-]*(/|$)", filled):
        raise ValueError(f"{name} is {text}: there is no such home folder; write the whole path")
    for variable in _VARIABLE.findall(filled):
        if not os.environ.get(variable.strip("{}")):
            raise ValueError(f"{name} is {text}: the environment variable {variable.strip('{}')} is not set")
    return os.path.expandvars(filled)


def path_argument(text: str) -> Path:
    """The path that a command's argument names, for argparse: the shell leaves `--run=~/x` as it is."""
    if os.path.exists(text):
        return Path(text)
    try:
        return Path(expanded(text, "the path"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
