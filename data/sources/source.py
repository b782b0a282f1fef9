"""Interface of a source for `data.prepare`: its images as items, their classes, and how to read one.

A pickled source is small, since it is sent to each worker process. Nothing is unpacked to disk, and no content of a
source is executed.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.storage.errors import UserError
from data.storage.location import DataError
from data.storage.paths import expanded
from data.storage.redaction import escaped

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".pgm", ".ppm")


HASH_BYTES = 16


class SourceError(UserError):
    """The whole source cannot be prepared; the message says what, where and what to do."""


class Item(NamedTuple):
    """One image of a source."""

    name: str
    """Unique within its source: a path with `/`, a number or a key."""
    num_bytes: int
    """Size of its file or pixels; 0 if unknown before it is read."""
    label: int | None
    """Class number, None without classes."""


class Skipped(NamedTuple):
    """Files that are left out for one reason."""

    num_files: int
    suffix: str
    """With its dot, in lower case; empty for names without one."""
    reason: str
    example: str
    """Name of one of them."""

    @property
    def text(self) -> str:
        """For a message."""
        suffix = shown_name(self.suffix) if self.suffix else "(no suffix)"
        return f"{self.num_files} {suffix} ({self.reason}), such as {shown_name(self.example)}"


class FormDefaults(NamedTuple):
    """Default form of a source's prepared images."""

    size: int | None
    """Height and width in pixels; None: no default."""
    channels: int
    """1 grey, 3 RGB; 2 for points in the plane."""
    upscale: bool
    """Enlarge images that are smaller than `size`."""
    condition_channels: int = 0
    """Channels of what is given with each image; 0: nothing."""


PHOTOGRAPHS = FormDefaults(None, 3, False)


class Source(Protocol):
    """Labelled images in a fixed order."""

    @property
    def description(self) -> str:
        """Kind and name, without the parent folder."""
        ...

    @property
    def items(self) -> tuple[Item, ...]:
        """All images in a fixed order. Not pickled with the source: workers are told which images to read."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, None without classes."""
        ...

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The files that are left out, by suffix and reason."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the classes."""
        ...

    @property
    def state(self) -> str:
        """Changes whenever the files of the source may have; equal only if they have not."""
        ...

    @property
    def defaults(self) -> FormDefaults:
        """The usual form of this source for training."""
        ...

    @property
    def only_here(self) -> bool:
        """Whether no other machine can read it: it lies in this user's cache, or in a file without a name."""
        ...

    def read(self, item: Item) -> bytes:
        """An image file that PIL can open; PGM or PPM if the source holds raw pixels.

        Raises:
            OSError: this image cannot be read; others may be readable.
            SourceError: the whole source is no longer readable.
        """
        ...

    def read_condition(self, item: Item) -> bytes:
        """The file of what is given with an image; empty if there is none. Raises what `read` raises."""
        ...


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """Fields of all sources. Pickling drops the items, open files and caches."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    state: str = ""
    defaults: FormDefaults = PHOTOGRAPHS
    only_here: bool = False

    def read_condition(self, item: Item) -> bytes:
        """Only pairs have one."""
        return b""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"items": ()}


@dataclass(frozen=True, kw_only=True)
class HeldSource(BaseSource):
    """Images that were read from another source, for a machine that cannot read it. Pickling keeps them."""

    description: str
    contents: dict[str, tuple[bytes, bytes] | str]
    """By the name of the item: its file and that of its condition, or why they cannot be read."""

    @classmethod
    def of(cls, source: Source, items: Sequence[Item]) -> "HeldSource":
        """Read some images. Raises SourceError if the whole source is no longer readable."""
        contents: dict[str, tuple[bytes, bytes] | str] = {}
        for item in items:
            try:
                contents[item.name] = source.read(item), source.read_condition(item)
            except OSError as error:
                contents[item.name] = error.strerror or str(error)
        return cls(items=(), description=source.description, contents=contents)

    def read(self, item: Item) -> bytes:
        """The file of an image."""
        return self._held(item)[0]

    def read_condition(self, item: Item) -> bytes:
        """The file of its condition."""
        return self._held(item)[1]

    def _held(self, item: Item) -> tuple[bytes, bytes]:
        if isinstance(found := self.contents[item.name], str):
            raise OSError(found)
        return found


class State:
    """Place, size and times of the files of a source, as one hash."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, file: Path, content: bytes = b"") -> os.stat_result:
        """Add a file and, if given, a part of its content.

        Raises:
            OSError: it is missing.
        """
        status = file.stat()
        place = os.fsencode(file.absolute())
        numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        self._hash.update(b"%d %s %d %d %d %d " % (len(place), place, *numbers) + content)
        return status

    @property
    def digest(self) -> str:
        """The hash of all files so far, hexadecimal."""
        return self._hash.hexdigest()


def fingerprint(source: Source) -> str:
    """SHA-256 over names, sizes and labels of all images: changes when images are added, removed or renamed."""
    digest = hashlib.sha256(source.description.encode("utf-8", "surrogateescape"))
    for item in source.items:
        digest.update(f"\0{item.name}\0{item.num_bytes}\0{item.label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hash_of(item: Item, content: bytes) -> int:
    """A hash of an image's name and bytes, of 128 bits."""
    name = item.name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(len(name).to_bytes(8) + name, digest_size=HASH_BYTES)
    digest.update(content)
    return int.from_bytes(digest.digest())


def pixel_file(pixels: bytes, *, size: int, channels: int) -> bytes:
    """A PGM or PPM file, so that raw pixels are handled like any other image.

    Args:
        pixels: uint8 [size, size, channels].
        size: height and width.
        channels: 1 grey, 3 RGB.
    """
    return b"P%d %d %d 255\n" % (5 if channels == 1 else 6, size, size) + pixels


def shown_name(name: str) -> str:
    """A name for a message: escapes line breaks, control characters and bytes that are not text."""
    return escaped(name)


def points_outside(name: str) -> bool:
    """Whether an archive member's name would leave the folder that the archive is unpacked to."""
    parts = name.replace("\\", "/").split("/")
    # A colon is a plain character, except after the letter of a Windows drive.
    return parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name) is not None


def filled(path: str, name: str) -> str:
    """A path of the source `name`, with `~` and variables, which the shell expands only at the start of a word.

    Raises:
        SourceError: a variable is not set.
    """
    try:
        return expanded(path, f"source {name}: the path")
    except DataError as error:
        raise SourceError(str(error)) from error


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for an impossible name."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False
