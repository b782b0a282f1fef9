"""Tables of a data set on the Hugging Face Hub, through its own client, which keeps them in its own cache."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data.formats.layout import Part, note_on, parts_of, select
from data.formats.tables import TableError, is_table
from data.storage.errors import UserError

PREFIX = "hf:"
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_CARD = "README.md"
_MAIN = "main"
_CONVERTED = "refs/convert/parquet"
"""Where the Hub keeps its own copies, as Parquet, of data sets of other forms."""
_TIMEOUT_S = 30.0
_SHOWN_FILES = 8


class HubTables(NamedTuple):
    """The tables of one part of a data set."""

    name: str
    """OWNER/NAME."""
    files: dict[str, Path]
    """Place of each table by its name."""
    state: str
    """The commit."""
    note: str
    """Which part it is, for the user."""


def fetch_tables(source: str, *, subset: str | None, split: str | None) -> HubTables:
    """Find a part of a data set, and fetch its tables; those that are in the cache are not fetched again.

    Args:
        source: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
        subset: the part that the Hub calls subset or config, None for the usual one.
        split: None for the usual one.

    Raises:
        UserError: no such data set or part, no tables, or the Hub cannot be reached; the message says what to do.
    """
    asked = _NAME.fullmatch(source.removeprefix(PREFIX))
    if asked is None:
        raise UserError(f"source {source}: expected is {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION")
    if find_spec("huggingface_hub") is None:
        raise UserError(
            f"source {source}: needs huggingface_hub, which this Python does not have: install the extra hub, "
            "pip install '.[hub]'"
        )
    name, revision = asked["name"], asked["revision"] or _MAIN
    with _explained(source, name):
        commit, names = _list(name, revision)
        if asked["revision"] is None and not any(map(is_table, names)):
            revision, commit, names = _list_converted(source, name, names)
        # By the name of the revision, whose commit the client then knows offline.
        card = _download(name, revision, [_CARD]) / _CARD
        try:
            parts = _parts_of_card(card, names) or parts_of(filter(is_table, names))
            if not any(map(is_table, names)):
                raise TableError(f"has no tables, but {_shown(names)}; {_by_hand(name)}")
            part, wanted = select(parts, subset=subset, split=split)
        except TableError as error:
            raise UserError(f"source {source}: {error}") from None
        folder = _download(name, commit, wanted)
    files = {file: folder / file for file in wanted}
    return HubTables(name, files, f"{commit} {' '.join(wanted)}", note_on(part, parts))


def _list(name: str, revision: str) -> tuple[str, list[str]]:
    """Commit and files of a data set; offline those that are in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        folder = _download(name, revision, [_CARD])
        return folder.name, [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    info = HfApi(endpoint=_endpoint()).dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    return info.sha or "", [sibling.rfilename for sibling in info.siblings or ()]


def _list_converted(source: str, name: str, others: list[str]) -> tuple[str, str, list[str]]:
    """Revision, commit and files of the Hub's own copy of a data set without tables; `others` if there is none."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:
        commit, names = _list(name, _CONVERTED)
    except (RevisionNotFoundError, LocalEntryNotFoundError):
        return _MAIN, "", others
    if any(part.startswith("partial-") for file in names for part in file.split("/")):
        raise UserError(
            f"source {source}: has no tables of its own, and the Hub's copy as Parquet has only a part of it; "
            f"{_by_hand(name)}"
        )
    return _CONVERTED, commit, names


def _download(name: str, commit: str, files: Iterable[str]) -> Path:
    """The folder of a commit in the client's cache, with these files in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None and not os.isatty(2):
        disable_progress_bars()
    patterns = [glob.escape(file) for file in files]
    return Path(
        snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=patterns, endpoint=_endpoint())
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _parts_of_card(card: Path, names: Iterable[str]) -> Mapping[Part, list[str]]:
    """The subsets and splits that a data set's card declares; empty if it does not, or not of tables."""
    if not card.is_file():
        return {}
    begin, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        document = yaml.safe_load(rest.partition("\n---")[0]) if not begin.strip() else None
    except (yaml.YAMLError, RecursionError):
        return {}
    configs = document.get("configs") if isinstance(document, dict) else None
    parts: dict[Part, list[str]] = {}
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            subset, folder = str(config.get("config_name", "default")), str(config.get("data_dir") or "")
            for split, pattern in _patterns(config.get("data_files")):
                wanted = f"{folder}/{pattern}" if folder else pattern
                found = [name for name in names if is_table(name) and fnmatch.fnmatchcase(name, wanted)]
                if found:
                    parts.setdefault(Part(subset, split), []).extend(sorted(found))
    return parts


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Split and pattern of each entry of `data_files`, which has several forms."""
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        if isinstance(entry, str):
            yield "train", entry
        elif isinstance(entry, dict):
            paths = entry.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                if isinstance(path, str):
                    yield str(entry.get("split", "train")), path


@contextmanager
def _explained(source: str, name: str) -> Iterator[None]:
    """What the client raises becomes one message."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"source {source}: its owner grants access; ask for it on the page of {name}, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"source {source}: the Hub has no such data set, or it is private: check the name, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"source {source}: the Hub has no such revision of it") from None
    except (LocalEntryNotFoundError, OSError, HTTPError, HFValidationError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"source {source}: could not be fetched: {reason}. {_by_hand(name)}") from None


def _by_hand(name: str) -> str:
    return (
        f"Where there is a network: hf download {name} --repo-type dataset --local-dir FOLDER; then give FOLDER as the "
        "source, or what can be made of it"
    )


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    return (", ".join(names[:_SHOWN_FILES]) + rest) or "no files at all"
