"""Subsets and splits of the tables of a data set, from the names of their files, as Hugging Face lays them out.

https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from data.formats.tables import TableError

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d{5}-of-\d{5}(-\w+)?")
_DATA = "data"
_USUAL_SUBSETS = ("", "default")
_SHOWN = 20


class Part(NamedTuple):
    """A part of a data set."""

    subset: str
    """Empty if there are none."""
    split: str
    """Empty if there are none."""


def parts_of(names: Iterable[str]) -> dict[Part, list[str]]:
    """The files of each part, sorted.

    Args:
        names: paths of tables, with `/`.
    """
    parts: dict[Part, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(_part(PurePosixPath(name)), []).append(name)
    if any(not part.split for part in parts):
        # Without a split for each file, the names say nothing: one data set in several files.
        return {Part("", ""): sorted(names)}
    return parts


def select(parts: Mapping[Part, list[str]], *, subset: str | None, split: str | None) -> tuple[Part, list[str]]:
    """The part that is asked for: without a wish the only one, else the usual one: subset `default`, split `train`.

    Raises:
        TableError: there is no such part, or none is the usual one.
    """
    subsets = list(dict.fromkeys(part.subset for part in parts))
    chosen = _one("subset", subset, subsets, _USUAL_SUBSETS)
    splits = [part.split for part in parts if part.subset == chosen]
    part = Part(chosen, _one("split", split, splits, ("train",)))
    return part, parts[part]


def note_on(part: Part, parts: Iterable[Part]) -> str:
    """Which part is read of which, for the user."""
    words = []
    for kind, taken, there in (
        ("subset", part.subset, {other.subset for other in parts}),
        ("split", part.split, {other.split for other in parts if other.subset == part.subset}),
    ):
        words += [f", {kind} {taken} of {', '.join(sorted(there))}"] if len(there) > 1 else []
    return "".join(words)


def _one(kind: str, asked: str | None, there: list[str], usual: tuple[str, ...]) -> str:
    named = ", ".join(there[:_SHOWN]) + (f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else "")
    if asked is not None:
        if asked in there:
            return asked
        if there == [""]:
            raise TableError(f"--{kind} {asked} is given, but it has no {kind}s; leave it out")
        raise TableError(f"--{kind} is {asked}, but its {kind}s are: {named}")
    if len(there) == 1:
        return there[0]
    for name in usual:
        if name in there:
            return name
    raise TableError(f"has several {kind}s; say which one with --{kind} NAME: {named}")


def _part(path: PurePosixPath) -> Part:
    folders = list(path.parent.parts)
    if shard := _SHARD.fullmatch(path.stem):
        split = shard["split"]
    elif words := [_WORDS[word] for word in re.split(r"[-._ \d]+", path.stem.lower()) if word in _WORDS]:
        split = words[0]
    elif folders and folders[-1].lower() in _WORDS:
        split = _WORDS[folders.pop().lower()]
    else:
        return Part("", "")
    if folders and folders[0] == _DATA:
        folders.pop(0)
    return Part("/".join(folders), split)
