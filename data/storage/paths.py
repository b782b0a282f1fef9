"""Paths as users write them: `~`, `$NAME` and `${NAME}` are filled in wherever a command or a setting takes a path."""

import argparse
import os
import re
from pathlib import Path

from data.storage.location import DataError, is_remote, is_url

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})", re.ASCII)


def expanded(text: str, name: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` filled in; one that exists as it is written is taken literally.

    Args:
        text: the path.
        name: what the user calls it, for messages.

    Raises:
        DataError: a home folder is unknown, or a variable is not set.
    """
    if _exists(text):
        return text
    filled = os.path.expanduser(text)
    if re.match(r"~[\w.-]*(/|$)", filled):
        raise DataError(f"{name} is {text}: there is no such home folder; write the whole path")
    for variable in _VARIABLE.findall(filled):
        if not os.environ.get(variable.strip("{}")):
            raise DataError(f"{name} is {text}: the environment variable {variable.strip('{}')} is not set")
    return os.path.expandvars(filled)


def user_cache(part: str) -> Path:
    """A folder for what can be fetched or made again: $XDG_CACHE_HOME/ddgan/PART, by default ~/.cache/ddgan/PART.

    Raises:
        DataError: the user has no home folder.
    """
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise DataError("there is no home folder to keep files in: set XDG_CACHE_HOME to a folder") from None
    return place / "ddgan" / part


def path_argument(text: str) -> Path:
    """The path that a command's argument names, for argparse: the shell leaves `--run=~/x` as it is."""
    return Path(_argument(text))


def location_argument(text: str) -> str:
    """The path or URL that a command's argument names, for argparse."""
    return text if is_remote(text) or is_url(text) else _argument(text)


def _argument(text: str) -> str:
    if not text:  # an unset variable of the shell would mean the current folder
        raise argparse.ArgumentTypeError("'' is given, expected is a path")
    try:
        return expanded(text, "the path")
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # a zero byte
        return False
