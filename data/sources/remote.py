"""Sources at a URL. Image files are read one by one where they are; archives, shards and tables are copied first."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.fetch.downloads import Report
from data.fetch.mirror import mirror_file, mirror_files
from data.formats.layout import parts_of, select
from data.formats.tables import ARROW_SUFFIXES, TableError, is_table
from data.sources.classes import LABELS_NAME, SYSTEM_FOLDERS, Classes
from data.sources.files import MAX_FILE_BYTES, classify_files
from data.sources.kinds import HIDDEN, SYSTEM, Skips, reason_to_skip
from data.sources.source import BaseSource, Item, SourceError, points_outside
from data.sources.tables import TableOptions
from data.sources.tars import COMPRESSED_SUFFIXES
from data.storage.redaction import redact
from data.storage.remote_folder import RemoteFile, RemoteFolder

_FILE_SUFFIXES = (".zip", ".tar", *COMPRESSED_SUFFIXES, ".npz", ".mdb", ".lmdb", ".parquet", ".pq", ".arrow")
_ARRAY_ENDS = ("-ubyte", "-ubyte.gz", ".npz")
_WHOLE_NAMES = ("cifar-10-python.tar.gz", "data.mdb")
_SHARD_INDEX = "index.json"
_SAVED_NAMES = ("dataset_dict.json", "state.json", "dataset_info.json")


class Listed(NamedTuple):
    """A remote folder and what lies in it."""

    url: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True, kw_only=True)
class RemoteSource(BaseSource):
    """Image files below a URL, each read when it is needed."""

    url: str

    @property
    def description(self) -> str:
        """`folder:NAME`, as of a local copy, whose prepared bytes are the same."""
        return f"folder:{redact(self.url).rpartition('/')[2]}"

    @cached_property
    def _storage(self) -> RemoteFolder:
        return RemoteFolder(self.url)

    def read(self, item: Item) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: it is missing, or too large.
            DataError: the storage does not answer, or refuses; the images so far are good.
        """
        if item.num_bytes > MAX_FILE_BYTES:
            raise OSError(f"it has {item.num_bytes} bytes, allowed are {MAX_FILE_BYTES}")
        content = self._storage.content(item.name)
        if content is None:
            raise OSError("it is gone")
        return content


def bring(url: str, kind: str | None, options: TableOptions, report: Report) -> "Path | Listed":
    """Look at a URL, and copy what can only be read from a disk.

    Args:
        url: of a file or a folder.
        kind: what the user says that it is, None to find out.
        options: which tables are wanted.
        report: is told the progress of copying.

    Returns:
        The local copy, or what lies in a folder of image files, which are read where they are.

    Raises:
        UserError: there is nothing that can be prepared, or it cannot be read.
    """
    url = url.rstrip("/")
    if url.lower().endswith(_FILE_SUFFIXES):
        return mirror_file(url, report)
    storage = RemoteFolder(url)
    if not storage.can_list:
        raise SourceError(
            f"source {redact(url)}: a web server does not say which files a folder has; give the URL of an archive "
            f"({' '.join(_FILE_SUFFIXES)}), or copy the folder (wget -r -np {redact(url)}/) and give the copy"
        )
    files = storage.listing()
    if not files:
        raise SourceError(f"source {redact(url)}: there are no files; check the URL")
    for name in files:
        if points_outside(name):
            raise SourceError(f"source {redact(url)}: {name!r} leads out of the folder; rename it")
    wanted = _to_copy(url, files, kind, options)
    if not wanted:
        return Listed(storage.url, files)
    part = f"{options.subset} {options.split}" if any(map(is_table, wanted)) else ""
    return mirror_files(storage, wanted, report, part=part)


def _to_copy(
    url: str, files: Mapping[str, RemoteFile], kind: str | None, options: TableOptions
) -> dict[str, RemoteFile]:
    """The files that are copied; empty for image files."""
    if kind == "folder":
        return {}
    at_top = {name for name in files if "/" not in name}
    shards = {name for name in at_top if name.lower().endswith(".tar")}
    others = {name for name in at_top if name in _WHOLE_NAMES or name.endswith(_ARRAY_ENDS)}
    tables = {name for name in files if is_table(name)}
    if shards and kind in (None, "webdataset"):
        names = shards | ({_SHARD_INDEX} & at_top)
    elif others and kind != "parquet":
        names = others
    elif tables and kind in (None, "parquet"):
        names = _wanted_tables(url, files, tables, options)
    elif kind is None:
        names = set()
    else:
        raise SourceError(f"source {kind}:{redact(url)}: no files of this kind in it; leave out {kind}: to find out")
    return {name: files[name] for name in sorted(names)}


def _wanted_tables(url: str, files: Mapping[str, RemoteFile], tables: set[str], options: TableOptions) -> set[str]:
    """The tables of the part that is asked for."""
    if any(name.lower().endswith(ARROW_SUFFIXES) for name in tables):
        return tables | {name for name in files if PurePosixPath(name).name in _SAVED_NAMES}
    try:
        _, names = select(parts_of(tables), subset=options.subset, split=options.split)
    except TableError as error:
        raise SourceError(f"source {redact(url)}: {error}") from None
    return set(names)


def remote_source(listed: Listed, *, classes: Classes) -> RemoteSource:
    """The image files of a remote folder, as `folder_source` finds them; their suffixes tell which they are.

    Raises:
        UserError: its dataset.json cannot be read, no images, or folders that are not clearly classes.
    """
    url = listed.url
    sizes: dict[str, int] = {}
    folders: set[str] = set()
    skips, state = Skips(), hashlib.sha256()
    for name, remote in listed.files.items():
        path = PurePosixPath(name)
        folders.update(str(parent) for parent in path.parents if str(parent) != ".")
        if any(part.startswith(".") for part in path.parts):
            skips.add(name, HIDDEN)
        elif SYSTEM_FOLDERS.intersection(path.parts[:-1]):
            skips.add(name, SYSTEM)
        elif reason := reason_to_skip(name, bytes):
            skips.add(name, reason, remote.num_bytes or 0)
        else:
            sizes[name] = remote.num_bytes or 0
        state.update(f"{name}\0{remote.num_bytes}\0{remote.version}\0".encode("utf-8", "surrogateescape"))
    has_labels = LABELS_NAME in listed.files and classes == "auto"
    labels = RemoteFolder(url).content(LABELS_NAME) if has_labels else None
    labelled = classify_files(
        f"source {redact(url)}",
        sizes,
        skips,
        classes=classes,
        folders=sorted(folders),
        labels=labels,
        give_part=lambda part: f"give one of them alone as the source, such as {redact(url)}/{part}",
    )
    return RemoteSource(url=url, skipped=skips.listed(), state=state.hexdigest(), **labelled._asdict())
