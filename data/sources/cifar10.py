"""CIFAR-10 as its authors distribute it: Python 2 pickles, in cifar-10-python.tar.gz or unpacked from it.

The archive is unpacked in memory, up to a maximum size.
"""

import contextlib
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data.formats.cifar10_pickle import PickledArray, as_text, load_restricted
from data.sources.arrays import ArraySource, LabelledPixels, Split, array_source
from data.sources.source import FormDefaults, SourceError

_FOLDER = "cifar-10-batches-py"
_ARCHIVE = "cifar-10-python.tar.gz"
_GZIP_START = b"\x1f\x8b"
_META = "batches.meta"
_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_BATCH_IMAGES = 10_000
_IMAGE_BYTES = 3 * 32 * 32
_MAX_BATCH_BYTES = 40 * 2**20
"""The authors' files have 31.04 * 10^6 bytes."""
_MAX_UNPACKED_BYTES = 200 * 2**20
"""The authors' archive unpacks to 186.2 * 10^6 bytes."""
_ADVICE = f"get {_ARCHIVE} from the authors' page again"


def find_cifar10(path: Path) -> Path | None:
    """The authors' archive, or the folder unpacked from it, at a path or directly below it."""
    if path.is_file():
        return path if path.name == _ARCHIVE or _begins_as_archive(path) else None
    for folder in (path, path / _FOLDER):
        if any((folder / name).is_file() for name in (_META, *_BATCHES["train"], *_BATCHES["test"])):
            return folder
    return path / _ARCHIVE if (path / _ARCHIVE).is_file() else None


def _begins_as_archive(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            first_block = stream.read(2**16)
            if first_block.startswith(_GZIP_START):
                first_block = zlib.decompressobj(wbits=31).decompress(first_block, tarfile.BLOCKSIZE)
    except (OSError, zlib.error):
        return False
    return first_block.startswith(_FOLDER.encode())


def cifar10_source(path: Path, *, split: Split) -> ArraySource:
    """CIFAR-10 at a path, or directly below it.

    Args:
        path: the authors' archive under any name, the folder unpacked from it, or a folder that holds either.
        split: train has 50,000 images, test 10,000.

    Raises:
        SourceError: no CIFAR-10 there, or it is damaged, incomplete or not the authors' version.
    """
    place = path if path.is_file() else find_cifar10(path)
    if place is None:
        raise SourceError(
            f"source {path}: no CIFAR-10 there; expected is {_ARCHIVE} or the folder {_FOLDER}, "
            "which are the authors' Python version"
        )
    place = place.resolve()
    [(_, content)] = _read_files(place, [_META])
    names = _unpickle(f"source {place}: {_META}", content).get("label_names")
    if not isinstance(names, list) or len(names) != 10 or not all(isinstance(name, bytes | str) for name in names):
        raise SourceError(f"source {place}: {_META} does not name ten classes; {_ADVICE}")
    return array_source(
        f"cifar10:{split}",
        partial(_load, place, split),
        class_names=tuple(as_text(name) for name in names),
        defaults=FormDefaults(32, 3, False),
    )


def _load(place: Path, split: Split) -> LabelledPixels:
    wanted = _BATCHES[split]
    planes = np.empty((len(wanted), _BATCH_IMAGES, _IMAGE_BYTES), dtype=np.uint8)
    labels = np.empty((len(wanted), _BATCH_IMAGES), dtype=np.int64)
    for name, content in _read_files(place, wanted):
        number = wanted.index(name)
        planes[number], labels[number] = _decode_batch(f"source {place}: {name}", content)
    pixels = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return LabelledPixels(pixels, labels.reshape(-1))


def _decode_batch(where: str, content: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Colour planes uint8 [10000, 3072] and labels int64 [10000]."""
    batch = _unpickle(where, content)
    pixels, labels = batch.get("data"), batch.get("labels")
    shape = (_BATCH_IMAGES, _IMAGE_BYTES)
    array = pixels.as_uint8(shape) if isinstance(pixels, PickledArray) else None
    if array is None:
        raise SourceError(f"{where}: its pixels are no complete uint8 array of shape {list(shape)}; {_ADVICE}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise SourceError(f"{where}: holds no labels of 0 to 9; {_ADVICE}")
    if len(labels) != _BATCH_IMAGES:
        raise SourceError(f"{where}: holds {len(labels)} labels, expected are {_BATCH_IMAGES}; {_ADVICE}")
    return array, np.asarray(labels, dtype=np.int64)


def _read_files(place: Path, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted files, in any order; one at a time, since they are large."""
    missing = set(wanted)
    try:
        for name, content in _folder_files(place, wanted) if place.is_dir() else _archive_files(place):
            if name not in missing:
                continue
            missing.remove(name)
            yield name, content()
            if not missing:
                return
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise SourceError(f"source {place}: cannot be read ({error}); {_ADVICE}") from None
    raise SourceError(f"source {place}: {', '.join(sorted(missing))} missing from CIFAR-10; {_ADVICE}")


def _folder_files(place: Path, wanted: list[str]) -> Iterator[tuple[str, "partial[bytes]"]]:
    for name in wanted:
        file = place / name
        if file.is_file():
            _refuse_large(f"source {place}: {name}", file.stat().st_size)
            yield name, partial(file.read_bytes)


def _archive_files(place: Path) -> Iterator[tuple[str, "partial[bytes]"]]:
    with place.open("rb") as stream, contextlib.ExitStack() as stack:
        is_packed = stream.read(2) == _GZIP_START
        stream.seek(0)
        unpacked = stack.enter_context(gzip.open(stream)) if is_packed else stream
        bounded = _BoundedStream(unpacked, f"source {place}")
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    name = member.name.rpartition("/")[2]
                    _refuse_large(f"source {place}: {name}", member.size)
                    yield name, partial(file.read)


def _refuse_large(where: str, num_bytes: int) -> None:
    if num_bytes > _MAX_BATCH_BYTES:
        raise SourceError(f"{where}: has {num_bytes} bytes, CIFAR-10's files at most {_MAX_BATCH_BYTES}; {_ADVICE}")


class _BoundedStream(io.RawIOBase):
    """Raises an error if an archive is larger than CIFAR-10."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, where: str) -> None:
        super().__init__()
        self._stream = stream
        self._where = where
        self._num_left = _MAX_UNPACKED_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        content = self._stream.read(min(size, self._num_left + 1) if size >= 0 else self._num_left + 1)
        self._num_left -= len(content)
        if self._num_left < 0:
            raise SourceError(f"{self._where}: unpacks to more than {_MAX_UNPACKED_BYTES} bytes; {_ADVICE}")
        return content


def _unpickle(where: str, content: bytes) -> dict[str, Any]:
    try:
        document = load_restricted(content)
    # A damaged pickle can raise nearly any exception.
    except Exception as error:
        raise SourceError(f"{where}: cannot be read as a CIFAR-10 file ({error}); {_ADVICE}") from None
    if not isinstance(document, dict):
        raise SourceError(f"{where}: holds no dictionary; {_ADVICE}")
    return {as_text(key): value for key, value in document.items()}
