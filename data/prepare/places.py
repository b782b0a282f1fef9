"""Where a preparation writes: a folder of this machine, or of all nodes; or a URL, which Ray's tasks write to."""

import re
import time
from collections.abc import Iterable
from typing import Protocol

from pydantic import TypeAdapter

from data.prepare.job import Preparation, refuse_difference
from data.prepare.journal import Journal, load_journal, parse_journal
from data.sets.origin import ORIGIN_NAME, Origin
from data.sets.work_folder import OutputError, WorkFolder
from data.shards.index import INDEX_NAME, DataFile, IndexDocument, ShardIndex, index_content, parse_index
from data.shards.verification import is_intact
from data.shards.writer import write_index
from data.storage.files import json_bytes
from data.storage.location import DataError
from data.storage.redaction import redact
from data.storage.writable import StorageError, WritableStorage

_JOURNAL_NAME = "journal.json"
_OWN_NAMES = re.compile(r"\d{5,}\.(tar|offsets)|journal\.json|origin\.json")
_SAVE_EVERY_S = 5.0
"""The journal at a URL is written as a whole each time."""


class Place(Protocol):
    """Unfinished work, and its end."""

    @property
    def shown(self) -> str:
        """For messages."""
        ...

    @property
    def location(self) -> str:
        """Folder or URL of the shards."""
        ...

    def load(self) -> Journal | None:
        """The journal of unfinished work."""
        ...

    def save(self, journal: Journal) -> None:
        """Write the journal."""
        ...

    def is_intact(self, file: DataFile) -> bool:
        """Whether a finished file is still there."""
        ...

    def discard(self, keep: frozenset[str]) -> None:
        """Remove all shards but the named ones."""
        ...

    def finish(self, origin: Origin, document: IndexDocument) -> None:
        """Write what belongs to the shards; the index, which makes them a data set, comes last."""
        ...


class FolderPlace:
    """The hidden folder next to the target."""

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self.shown = str(work.path)
        self.location = str(work.result)

    def load(self) -> Journal | None:
        """See `Place`."""
        return load_journal(self._work.journal)

    def save(self, journal: Journal) -> None:
        """See `Place`."""
        journal.save(self._work.journal)

    def is_intact(self, file: DataFile) -> bool:
        """See `Place`. Compares the hash."""
        return is_intact(self._work.result, file)

    def discard(self, keep: frozenset[str]) -> None:
        """See `Place`."""
        self._work.discard(keep)

    def finish(self, origin: Origin, document: IndexDocument) -> None:
        """See `Place`."""
        origin.save(self._work.result)
        write_index(self._work.result, document)


class UrlPlace:
    """The target itself: without an index.json it is no data set. Two preparations at once are not told apart."""

    def __init__(self, url: str) -> None:
        """Ask for the files that are there.

        Raises:
            DataError: the URL cannot be written, or does not answer.
        """
        self._storage = WritableStorage(url)
        self.location = self._storage.url
        self.shown = redact(url)
        self._saved_at = float("-inf")
        if self.location.startswith("http"):
            raise DataError(f"--out {self.shown}: a web server takes no files; give s3:// or other storage")
        try:
            self._sizes = self._storage.retried(INDEX_NAME, self._storage.files)
        except StorageError as error:
            raise DataError(str(error)) from error

    def find(self, job: Preparation) -> ShardIndex | None:
        """The index of this data set if it is there; None if the place is free or has unfinished work.

        Raises:
            OutputError: it holds something else, or a damaged data set.
        """
        advice = "choose another --out, or remove it yourself"
        content = self._read(INDEX_NAME)
        if content is None:
            if foreign := sorted(name for name in self._sizes if not _OWN_NAMES.fullmatch(name)):
                raise OutputError(f"--out {self.shown} holds other files, such as {foreign[0]}; {advice}")
            return None
        index = parse_index(content, self.location)
        refuse_difference(job, index)
        if missing := [file.title for file in index.files if not self.is_intact(file)]:
            raise OutputError(
                f"--out {self.shown} holds a damaged data set: {missing[0]} is missing or has another size"
            )
        return index

    def load(self) -> Journal | None:
        """See `Place`."""
        content = self._read(_JOURNAL_NAME)
        return None if content is None else parse_journal(content)

    def save(self, journal: Journal) -> None:
        """See `Place`. Not each time: what is finished later is prepared again after a stop."""
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._put(_JOURNAL_NAME, journal.content())
            self._saved_at = time.monotonic()

    def is_intact(self, file: DataFile) -> bool:
        """See `Place`. Compares the size: the hash was compared when the file was written."""
        return self._sizes.get(file.name) == file.num_bytes

    def discard(self, keep: frozenset[str]) -> None:
        """See `Place`."""
        self._remove(name for name in self._sizes if re.fullmatch(r"\d{5,}\.(tar|offsets)", name) and name not in keep)

    def finish(self, origin: Origin, document: IndexDocument) -> None:
        """See `Place`."""
        self._put(ORIGIN_NAME, json_bytes(TypeAdapter(Origin).dump_python(origin)))
        self._put(INDEX_NAME, json_bytes(index_content(document)))
        self._remove([_JOURNAL_NAME])

    def _read(self, name: str) -> bytes | None:
        return self._storage.retried(name, lambda: self._storage.read_if_there(name))

    def _put(self, name: str, content: bytes) -> None:
        self._storage.retried(name, lambda: self._storage.put(name, content))

    def _remove(self, names: Iterable[str]) -> None:
        self._storage.retried("the leftovers", lambda: self._storage.remove(list(names)))
