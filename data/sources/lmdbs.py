"""Images in an LMDB: LSUN's (encoded images) and CelebA-HQ's (encoded images, or bare 256x256 RGB pixels).

The database is read by a process of its own, since a damaged one can end the process that reads it.
"""

import contextlib
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from data.formats import lmdb_reader
from data.formats.lmdb_reader import LENGTH, Answer, Request
from data.sources.kinds import is_image_start
from data.sources.source import BaseSource, FormDefaults, Item, SourceError, State, pixel_file

DATA_NAME = "data.mdb"
_RAW_SIZE = 256
_RAW_BYTES = 3 * _RAW_SIZE**2
_META_BYTES = 2 * 4096
"""The pages with the numbers of the last transactions."""
_NUM_SNIFFED = 16
"""Values checked to find out what the database holds."""


class DatabaseError(OSError):
    """The database cannot be read, or not at this place; the message says why."""


class _Database:
    """The process that reads a database. It ends with this object, or with this process."""

    def __init__(self, file: Path) -> None:
        """Open a database.

        Raises:
            DatabaseError: it is no LMDB, or damaged.
        """
        self._process = subprocess.Popen(
            # -P: this script's folder is no place for imports.
            [sys.executable, "-P", lmdb_reader.__file__, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.close = weakref.finalize(self, _end, self._process)
        self._receive()

    def ask(self, request: bytes, payload: bytes = b"") -> bytes | None:
        """Send a request; None if the key is missing.

        Raises:
            DatabaseError: the database is damaged.
        """
        assert self._process.stdin is not None
        # A dead reader is noticed when it gives no answer.
        with contextlib.suppress(BrokenPipeError):
            lmdb_reader.write_message(self._process.stdin, request, payload)
        return self._receive()

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self.close.alive

    def _receive(self) -> bytes | None:
        assert self._process.stdout is not None
        message = lmdb_reader.read_message(self._process.stdout)
        if message is None:
            self.close()
            raise DatabaseError("reading it made LMDB end its process")
        kind, payload = message
        if kind == Answer.FAULT:
            raise DatabaseError(payload.decode(errors="replace"))
        return None if kind == Answer.MISSING else payload


def _end(process: "subprocess.Popen[bytes]") -> None:
    # It may be at work on a request, or dead.
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    process.wait()


@dataclass(frozen=True, kw_only=True)
class LmdbSource(BaseSource):
    """Values of an LMDB; an item's name is its key, with `%XX` for bytes that are not plain text."""

    file: Path
    is_raw: bool
    """Values are 256x256x3 RGB bytes, not image files."""

    @property
    def description(self) -> str:
        """`lmdb:NAME`: the file name, or the folder name if the file has LMDB's usual name."""
        return f"lmdb:{self.file.parent.name if self.file.name == DATA_NAME else self.file.name}"

    @cached_property
    def _open(self) -> list[_Database]:
        """The open database of this process, if any."""
        return []

    def read(self, item: Item) -> bytes:
        """The value, as a PPM file if it is raw pixels; the database stays open in this process."""
        if not (self._open and self._open[-1].is_alive):
            try:
                self._open[:] = [_Database(self.file)]
            except DatabaseError as error:
                raise SourceError(f"source {self.file}: no readable LMDB any more ({error}); get it again") from None
        try:
            value = self._open[-1].ask(Request.VALUE, unquote_to_bytes(item.name))
        except DatabaseError as error:
            raise OSError(f"the database is damaged: {error}") from None
        if value is None:
            raise OSError("its key is gone from the database")
        if not self.is_raw:
            return value
        if len(value) != _RAW_BYTES:
            raise OSError(f"has {len(value)} bytes, raw pixels are {_RAW_BYTES} as of the images before")
        return pixel_file(value, size=_RAW_SIZE, channels=3)


def lmdb_source(path: Path, *, max_images: int | None) -> LmdbSource:
    """List the keys of an LMDB: in database order, or by number if all are decimal numbers.

    Args:
        path: the folder of a data.mdb, or a single-file database.
        max_images: the listing stops after that many keys, unless sorting needs all.

    Raises:
        SourceError: not an LMDB, damaged, or without images.
    """
    file = (path / DATA_NAME if path.is_dir() else path).resolve()
    if not file.is_file():
        raise SourceError(f"source {path}: no {DATA_NAME} in it; give the folder that holds the LMDB's {DATA_NAME}")
    state = State()
    with file.open("rb") as stream:
        # Its own counters: the time of a mapped file may be late.
        state.add(file, stream.read(_META_BYTES))
    try:
        database = _Database(file)
    except DatabaseError as error:
        raise SourceError(f"source {file}: no readable LMDB ({error}); get it again") from None
    with contextlib.closing(database):
        try:
            keys = _list_keys(database, max_images)
            is_raw = _sniff(path, database, keys[:_NUM_SNIFFED])
        except DatabaseError as error:
            raise SourceError(f"source {path}: the LMDB is damaged ({error}); get it again") from None
    num_bytes = _RAW_BYTES if is_raw else 0
    items = tuple(Item(quote_from_bytes(key, safe="/ "), num_bytes, None) for key in keys)
    defaults = FormDefaults(_RAW_SIZE if is_raw else None, 3, False)
    return LmdbSource(file=file, is_raw=is_raw, items=items, defaults=defaults, state=state.digest)


def _list_keys(database: _Database, max_images: int | None) -> list[bytes]:
    answer = database.ask(Request.KEYS, b"" if max_images is None else b"%d" % max_images) or b""
    (stated,) = LENGTH.unpack_from(answer)
    keys: list[bytes] = []
    place = LENGTH.size
    while place < len(answer):
        (length,) = LENGTH.unpack_from(answer, place)
        place += LENGTH.size + length
        keys.append(answer[place - length : place])
    # A listing that was not stopped early has all keys.
    if len(keys) != stated and (max_images is None or len(keys) < max_images):
        raise DatabaseError(f"it says that it has {stated} entries, {len(keys)} can be listed")
    if all(key.isdigit() for key in keys):
        # b"10" sorts before b"9".
        keys.sort(key=lambda key: (int(key), key))
    return keys[:max_images]


def _sniff(path: Path, database: _Database, keys: Sequence[bytes]) -> bool:
    """Whether values are raw pixels; refuses a database whose first values are neither raw pixels nor images."""
    if not keys:
        raise SourceError(f"source {path}: the LMDB is empty; get it again")
    values = [database.ask(Request.VALUE, key) or b"" for key in keys]
    if all(len(value) == _RAW_BYTES for value in values):
        return True
    if any(is_image_start(value) for value in values):
        return False
    if database.ask(Request.NAMED, keys[0]) == b"\1":
        raise SourceError(
            f"source {path}: the LMDB holds named sub-databases, such as {_shown(keys[0])}; "
            "expected is one database of images"
        )
    raise SourceError(
        f"source {path}: the first {len(values)} values of the LMDB are no images: {_shown(keys[0])} has "
        f"{len(values[0])} bytes, which begin with {values[0][:8]!r}; expected are image files, as in LSUN, or "
        f"{_RAW_BYTES} bytes of pixels each, as in CelebA-HQ"
    )


def _shown(key: bytes) -> str:
    return f"key {quote_from_bytes(key[:60], safe='/ ')}"
