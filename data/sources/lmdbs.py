"""Images in an LMDB: LSUN's (encoded images) and CelebA-HQ's (encoded images, or bare 256x256 RGB pixels)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes
from weakref import WeakValueDictionary

import lmdb

from data.sources.source import BaseSource, FormDefaults, Item, SourceError, pixel_file

DATA_NAME = "data.mdb"
_RAW_SIZE = 256
_RAW_BYTES = 3 * _RAW_SIZE**2
_NUM_SNIFFED = 16
"""Values checked to find out what the database holds."""
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
_open_environments: WeakValueDictionary[Path, lmdb.Environment] = WeakValueDictionary()
"""LMDB forbids opening a database twice in one process. It closes with the last source that uses it."""


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
    def _environment(self) -> lmdb.Environment:
        return _open(self.file)

    def read(self, item: Item) -> bytes:
        """The value, as a PPM file if it is raw pixels; the database stays open in this process."""
        try:
            with self._environment.begin() as transaction:
                value = transaction.get(unquote_to_bytes(item.name))
        except lmdb.Error as error:
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
    environment = _open(file)
    try:
        keys = _list_keys(environment, max_images)
        is_raw = _sniff(path, environment, keys[:_NUM_SNIFFED])
    except lmdb.Error as error:
        raise SourceError(f"source {path}: the LMDB is damaged ({error}); get it again") from None
    num_bytes = _RAW_BYTES if is_raw else 0
    items = tuple(Item(quote_from_bytes(key, safe="/ "), num_bytes, None) for key in keys)
    defaults = FormDefaults(_RAW_SIZE if is_raw else None, 3, False)
    return LmdbSource(file=file, is_raw=is_raw, items=items, defaults=defaults)


def _open(file: Path) -> lmdb.Environment:
    environment = _open_environments.get(file)
    if environment is not None:
        return environment
    try:
        # No locks, since the folder may be read-only; no read-ahead, since keys are read in shuffled order.
        environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=1)
    except lmdb.Error as error:
        raise SourceError(f"source {file}: no readable LMDB ({error}); get it again") from None
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < expected:
        # Reading past the end of a mapped file kills the process.
        raise SourceError(f"source {file}: has {file.stat().st_size} bytes of {expected}; it is cut off, get it again")
    _open_environments[file] = environment
    return environment


def _list_keys(environment: lmdb.Environment, max_images: int | None) -> list[bytes]:
    keys: list[bytes] = []
    are_numbers = True
    with environment.begin() as transaction:
        # Only keys, no sizes: lmdb reads all pages of a value that it returns, otherwise only the first.
        for key in transaction.cursor().iternext(keys=True, values=False):
            keys.append(key)
            are_numbers = are_numbers and key.isdigit()
            if len(keys) == max_images and not are_numbers:
                break
    if are_numbers:
        # b"10" sorts before b"9".
        keys.sort(key=lambda key: (int(key), key))
    return keys[:max_images]


def _sniff(path: Path, environment: lmdb.Environment, keys: Sequence[bytes]) -> bool:
    """Whether values are raw pixels; refuses a database whose first values are neither raw pixels nor images."""
    if not keys:
        raise SourceError(f"source {path}: the LMDB is empty; get it again")
    with environment.begin() as transaction:
        values = [transaction.get(key, b"") for key in keys]
    if all(len(value) == _RAW_BYTES for value in values):
        return True
    if any(value.startswith(_IMAGE_STARTS) or (value[:4], value[8:12]) == (b"RIFF", b"WEBP") for value in values):
        return False
    if _is_named_database(environment, keys[0]):
        raise SourceError(
            f"source {path}: the LMDB holds named sub-databases, such as {_shown(keys[0])}; "
            "expected is one database of images"
        )
    raise SourceError(
        f"source {path}: the first {len(values)} values of the LMDB are no images: {_shown(keys[0])} has "
        f"{len(values[0])} bytes, which begin with {values[0][:8]!r}; expected are image files, as in LSUN, or "
        f"{_RAW_BYTES} bytes of pixels each, as in CelebA-HQ"
    )


def _is_named_database(environment: lmdb.Environment, key: bytes) -> bool:
    try:
        environment.open_db(key, create=False)
    except lmdb.Error:
        return False
    return True


def _shown(key: bytes) -> str:
    return f"key {quote_from_bytes(key[:60], safe='/ ')}"
