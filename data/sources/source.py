"""What `data.prepare` needs to know of any source: its images as items, their classes, and how to read one.

A source is small to pickle, since it goes to each worker process. Nothing is ever unpacked to disk, and nothing that a
source holds is executed.
"""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

from data.storage.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class SourceError(UserError):
    """The source as a whole cannot be prepared; the message says what, where and what to do."""


class Item(NamedTuple):
    """One image of a source."""

    name: str
    """Unique within its source: a path with `/`, a number or a key."""
    num_bytes: int
    """Size of its file or pixels; 0 where that shows only when the image is read."""
    label: int | None
    """Class number, None without classes."""


class FormDefaults(NamedTuple):
    """What becomes of a source's images where the user does not say."""

    size: int | None
    """Height and width in pixels; None: the user must say."""
    channels: Literal[1, 2, 3]
    """1 grey, 3 RGB; 2 for points of the plane."""
    upscale: bool
    """Enlarge images that are smaller than `size`."""


PHOTOGRAPHS = FormDefaults(None, 3, False)


class Source(Protocol):
    """Labelled images in a fixed order."""

    @property
    def description(self) -> str:
        """Kind and name, without the folder it lies in."""
        ...

    @property
    def items(self) -> tuple[Item, ...]:
        """All images in a fixed order. They stay behind when a source is pickled: a worker is told what to read."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, None without classes."""
        ...

    @property
    def num_skipped(self) -> int:
        """Files that were left out as no images, or as a second image of one sample."""
        ...

    @property
    def defaults(self) -> FormDefaults:
        """The form in which this source is usually trained on."""
        ...

    def read(self, item: Item) -> bytes:
        """An image file that PIL can open; PGM or PPM where the source holds bare pixels.

        Raises:
            OSError: this image cannot be read; others may.
            SourceError: the source as a whole cannot be read any more.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """What all sources hold. Pickled, it leaves behind its items and all that it has opened or cached."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None = None
    num_skipped: int = 0
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
    """A PGM or PPM file, so that bare pixels take the same way as any other image.

    Args:
        pixels: uint8 [size, size, channels].
        size: height and width.
        channels: 1 grey, 3 RGB.
    """
    return b"P%d %d %d 255\n" % (5 if channels == 1 else 6, size, size) + pixels


def shown_name(name: str) -> str:
    """A name for a message: one line of text that does nothing to a terminal; names of files may be neither."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)


def points_outside(name: str) -> bool:
    """Whether a member of an archive names a place outside the folder that the archive would be unpacked to."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or ".." in parts or ":" in parts[0]
