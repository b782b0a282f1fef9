"""Tells image files from others by suffix, else by their first bytes; counts what is left out."""

from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

from data.sources.source import IMAGE_SUFFIXES, Skipped, SourceError

START_BYTES = 262
"""The bytes that `reason_to_skip` needs from the start of a file; the longest are tar's."""


class Reason(NamedTuple):
    """Why files are left out."""

    text: str
    """As a message names it."""
    is_loss: bool = False
    """They are images, or may be."""


NO_IMAGE, HIDDEN = Reason("no images"), Reason("hidden")
SYSTEM = Reason("folders of the system or a file server")
PREPARED = Reason("prepared data sets")
REPLACED = Reason("replaced by a later file of the same name")
FURTHER = Reason("further images of a sample, by the part of the name before its first dot", True)
LINK = Reason("links, devices or sparse files", True)
ARCHIVE = Reason("archives, which are not opened")
_MAX_ARCHIVE_RATIO = 2
"""An archive may be what the images were unpacked from. One that is larger by this factor holds others."""
_LISTED = 5
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_STARTS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"\x76\x2f\x31\x01": "OpenEXR",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIC")}
_OTHER_SUFFIXES = {
    ".avif": "AVIF",
    **dict.fromkeys((".heic", ".heif"), "HEIC"),
    ".jxl": "JPEG XL",
    **dict.fromkeys((".j2k", ".jp2", ".jpf", ".jpx"), "JPEG 2000"),
    ".psd": "Photoshop",
    ".exr": "OpenEXR",
    ".tga": "Targa",
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "camera raw"),
}
# fmt: off
_ARCHIVE_SUFFIXES = frozenset({
    ".7z", ".bz2", ".gz", ".h5", ".hdf5", ".lmdb", ".lz4", ".mdb", ".npz", ".parquet", ".rar", ".rec", ".tar", ".tbz2",
    ".tfrecord", ".tgz", ".txz", ".xz", ".zip", ".zst",
})
_PLAIN_SUFFIXES = frozenset({
    ".caption", ".cls", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".js", ".json", ".jsonl", ".log",
    ".lst", ".mat", ".md", ".npy", ".pdf", ".pkl", ".pt", ".py", ".sh", ".tsv", ".txt", ".xml", ".yaml", ".yml",
})
"""Never images, and often as many as the images; they are not opened."""
# fmt: on
_ARCHIVE_STARTS = (b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")


def is_image_start(start: bytes) -> bool:
    """Whether a file that begins so is an image of a format that can be read."""
    if start.startswith(_STARTS) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP"):
        return True
    # A bitmap has four zeros there. Portable any-maps, P1 to P6, have white space after their kind.
    is_map = start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace()
    return is_map or (start[:2], start[6:10]) == (b"BM", bytes(4))


def foreign_kind(start: bytes) -> str | None:
    """What a file that begins so is instead of an image or an archive, and what to do; None if unknown."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "is an HTML page, as a failed download leaves it; download it again"
    kind = _other_kind(start)
    return None if kind is None else f"is {kind}, which is not read; convert it to PNG or JPEG"


def _other_kind(start: bytes) -> str | None:
    other = next((kind for begin, kind in _OTHER_STARTS.items() if start.startswith(begin)), None)
    return other or (_BRANDS.get(start[8:12]) if start[4:8] == b"ftyp" else None)


def reason_to_skip(name: str, read_start: Callable[[], bytes]) -> Reason | None:
    """Why a file is no image that can be read; None if it is one, by its name or, with an unknown one, by its start.

    Args:
        name: its path.
        read_start: reads its first `START_BYTES` bytes.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return HIDDEN
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in _OTHER_SUFFIXES:
        return _unread(_OTHER_SUFFIXES[suffix])
    if suffix in _ARCHIVE_SUFFIXES:
        return ARCHIVE
    if suffix in _PLAIN_SUFFIXES:
        return NO_IMAGE
    start = read_start()
    if is_image_start(start):
        return None
    if other := _other_kind(start):
        return _unread(other)
    return ARCHIVE if start.startswith(_ARCHIVE_STARTS) or start[257:262] == b"ustar" else NO_IMAGE


def reason_to_skip_no_array(name: str, _: Callable[[], bytes]) -> Reason | None:
    """`reason_to_skip` where the images are .npy files alone."""
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return HIDDEN
    return None if path.suffix.lower() == ".npy" else NO_IMAGE


def _unread(kind: str) -> Reason:
    return Reason(f"{kind}, which is not read: convert them to PNG or JPEG", True)


class _Group(NamedTuple):
    reason: Reason
    suffix: str


class Skips:
    """Counts the files of a source that are left out."""

    def __init__(self) -> None:
        self._counts: Counter[_Group] = Counter()
        self._bytes: Counter[_Group] = Counter()
        self._examples: dict[_Group, str] = {}

    def add(self, name: str, reason: Reason, num_bytes: int = 0) -> None:
        """Count a file."""
        group = _Group(reason, PurePosixPath(name).suffix.lower())
        self._counts[group] += 1
        self._bytes[group] += num_bytes
        self._examples.setdefault(group, name)

    def count(self, reason: Reason) -> int:
        """The files that are left out for a reason."""
        return sum(count for group, count in self._counts.items() if group.reason == reason)

    @property
    def total(self) -> int:
        """All files that are left out."""
        return self._counts.total()

    def listed(self) -> tuple[Skipped, ...]:
        """A line for each suffix and reason, most files first."""
        return tuple(map(self._line, sorted(self._counts, key=lambda group: (-self._counts[group], group))))

    def refuse_losses(self, where: str, num_images: int, num_bytes: int) -> None:
        """Refuse a source of which more images would be lost than kept.

        Args:
            where: the source, for the message.
            num_images: the images that are kept.
            num_bytes: their bytes.

        Raises:
            SourceError: it lists what would be lost.
        """
        lost = [group for group in self._counts if group.reason.is_loss]
        if sum(self._counts[group] for group in lost) <= num_images:
            lost = []
        limit = _MAX_ARCHIVE_RATIO * num_bytes
        lost += [group for group, size in self._bytes.items() if group.reason == ARCHIVE and size > limit]
        if lost:
            named = "; ".join(self._line(group).text for group in lost[:_LISTED])
            named += f"; and {len(lost) - _LISTED} more kinds" if len(lost) > _LISTED else ""
            raise SourceError(
                f"{where}: more would be lost than the {num_images} images that can be read: {named}. "
                "Unpack, rename or convert these files, or move them elsewhere"
            )

    def _line(self, group: _Group) -> Skipped:
        return Skipped(self._counts[group], group.suffix, group.reason.text, self._examples[group])
