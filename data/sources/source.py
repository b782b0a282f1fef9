"""Interface of a source for `data.prepare`: its images as items, their classes, and how to read one.

A pickled source is small, since it is sent to each worker process. Nothing is unpacked to disk, and no content of a
source is executed.
"""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

from data.storage.errors import UserError
from data.storage.redaction import escaped

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".pgm", ".ppm")


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
    channels: Literal[1, 2, 3]
    """1 grey, 3 RGB; 2 for points in the plane."""
    upscale: bool
    """Enlarge images that are smaller than `size`."""


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
    def defaults(self) -> FormDefaults:
        """The usual form of this source for training."""
        ...

    def read(self, item: Item) -> bytes:
        """An image file that PIL can open; PGM or PPM if the source holds raw pixels.

        Raises:
            OSError: this image cannot be read; others may be readable.
            SourceError: the whole source is no longer readable.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """Fields of all sources. Pickling drops the items, open files and caches."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None = None
    skipped: tuple[Skipped, ...] = ()
    defaults: FormDefaults = PHOTOGRAPHS

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"items": ()}


def fingerprint(source: Source) -> str:
    """SHA-256 over names, sizes and labels of all images: changes when images are added, removed or renamed."""
    digest = hashlib.sha256(source.description.encode("utf-8", "surrogateescape"))
    for item in source.items:
        digest.update(f"\0{item.name}\0{item.num_bytes}\0{item.label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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
    return parts[0] == "" or ".." in parts or ":" in parts[0]
