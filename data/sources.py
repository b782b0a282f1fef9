"""Labelled images to prepare: where they are, in which order, and how a worker process reads one.

A source is small and picklable: it goes to each worker process once. Nothing is ever unpacked to disk.
"""

import hashlib
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MAX_FILE_BYTES = 512 * 2**20
_MAX_ZIP_RATIO = 200
"""Images hardly compress; a member that unpacks to more than this many times its size is no image."""
_RATIO_MATTERS_BYTES = 16 * 2**20


class SourceError(ValueError):
    """The source as a whole cannot be prepared; the message says what, where and what to do."""


class Item(NamedTuple):
    """One image of a source."""

    name: str
    """Path of the image within its source, with `/`."""
    num_bytes: int
    """Size of its file."""
    label: int | None
    """Class number, None without classes."""


class Source(Protocol):
    """What `data.prepare` needs of a source."""

    @property
    def description(self) -> str:
        """Kind and name, without the folder it lies in."""
        ...

    @property
    def items(self) -> tuple[Item, ...]:
        """All images in a fixed order."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, None without classes."""
        ...

    @property
    def num_skipped(self) -> int:
        """Files that are no images by their suffix."""
        ...

    def read(self, item: Item) -> bytes:
        """The bytes of an image file."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Image files under a folder; sub-folders, if any, are the classes."""

    root: Path
    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None
    num_skipped: int

    @property
    def description(self) -> str:
        """`folder:NAME`."""
        return f"folder:{self.root.name}"

    def read(self, item: Item) -> bytes:
        """The bytes of an image file."""
        return (self.root / item.name).read_bytes()


@dataclass(frozen=True, kw_only=True)
class ZipSource:
    """Images in a zip archive, read in place."""

    file: Path
    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None
    num_skipped: int
    _opened: list[zipfile.ZipFile] = field(default_factory=list, repr=False, compare=False)

    @property
    def description(self) -> str:
        """`zip:NAME`."""
        return f"zip:{self.file.name}"

    def read(self, item: Item) -> bytes:
        """The bytes of a member; the archive stays open in this process."""
        if not self._opened:
            self._opened.append(zipfile.ZipFile(self.file))
        try:
            with self._opened[0].open(item.name) as stream:
                # Not more than the directory states, which was checked: the stream may hold more.
                return stream.read(item.num_bytes)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise OSError(f"cannot unpack: {error}") from None


@dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 grey, ten classes."""

    pixels: bytes
    """uint8 [N, 8, 8]."""
    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None = tuple("0123456789")
    num_skipped: int = 0
    description: str = "digits"

    def read(self, item: Item) -> bytes:
        """The image as a PGM file, so that it takes the same way as any other."""
        start = int(item.name) * 64
        return b"P5 8 8 255\n" + self.pixels[start : start + 64]


def open_source(name: str) -> Source:
    """Find the images of a source by name or path.

    Args:
        name: `digits`, a folder, or a .zip file.

    Raises:
        SourceError: there is no such source, or it holds nothing that can be prepared.
    """
    if name == "digits":
        return _digits()
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise SourceError(
            f"source {name}: no such file or folder; allowed are: digits, a folder of images, a .zip file"
        )
    if path.suffix.lower() != ".zip":
        raise SourceError(
            f"source {name}: unknown kind of file {path.suffix or '(no suffix)'}; "
            "allowed are: digits, a folder of images, a .zip file"
        )
    return _zip(path)


def fingerprint(source: Source) -> str:
    """SHA-256 over names, sizes and labels of all images: changes when images are added, removed or renamed."""
    digest = hashlib.sha256(source.description.encode())
    for item in source.items:
        digest.update(f"\0{item.name}\0{item.num_bytes}\0{item.label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digits() -> DigitsSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("source digits: scikit-learn is missing; install it with: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    # Grey values are 0 .. 16.
    pixels = (images * (255 / 16)).round().astype("uint8")
    items = tuple(Item(f"{number:04d}", 64, int(label)) for number, label in enumerate(labels))
    return DigitsSource(pixels=pixels.tobytes(), items=items)


def _folder(root: Path) -> FolderSource:
    files: dict[str, int] = {}
    num_skipped = 0
    seen: set[str] = set()
    try:
        # Class folders are often links; a link to a folder that was visited already is a circle.
        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in names:
                file = Path(folder, name)
                if name.startswith(".") or file.suffix.lower() not in IMAGE_SUFFIXES:
                    num_skipped += 1
                else:
                    files[file.relative_to(root).as_posix()] = file.stat().st_size
    except OSError as error:
        raise SourceError(f"source {root}: cannot read {error.filename}: {error.strerror}") from None
    items, class_names = _classify(f"source {root}", files, num_skipped)
    return FolderSource(root=root.resolve(), items=items, class_names=class_names, num_skipped=num_skipped)


def _raise(error: OSError) -> None:
    raise error


def _zip(file: Path) -> ZipSource:
    files: dict[str, int] = {}
    num_skipped = 0
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"source {file}: not a readable zip archive ({error}); download or pack it again") from None
    for member in members:
        _refuse_dangerous(file, member)
        path = PurePosixPath(member.filename)
        if member.is_dir() or path.parts[:1] == ("__MACOSX",):
            continue
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
            num_skipped += 1
        else:
            files[member.filename] = member.file_size
    items, class_names = _classify(f"source {file}", files, num_skipped)
    return ZipSource(file=file.resolve(), items=items, class_names=class_names, num_skipped=num_skipped)


def _refuse_dangerous(file: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    where = f"source {file}: member {name!r}"
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise SourceError(f"{where} points outside the archive; pack the images again with relative paths")
    if member.flag_bits & 0x1:
        raise SourceError(f"{where} is encrypted; pack the images again without a password")
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > _MAX_FILE_BYTES or (member.file_size > _RATIO_MATTERS_BYTES and ratio > _MAX_ZIP_RATIO):
        raise SourceError(
            f"{where} would unpack to {member.file_size} bytes from {member.compress_size}, which no photograph does; "
            "remove it from the archive"
        )


def _classify(where: str, files: dict[str, int], num_skipped: int) -> tuple[tuple[Item, ...], tuple[str, ...] | None]:
    """Sort the images and number the classes: the first folder of each path below the folder common to all."""
    if not files:
        raise SourceError(
            f"{where}: no images in it ({num_skipped} other files); known suffixes: {' '.join(IMAGE_SUFFIXES)}"
        )
    names = sorted(files)
    split = {name: PurePosixPath(name).parts for name in names}
    # An archive usually holds one folder with everything inside; that is no class.
    depth = 0
    while all(len(parts) > depth + 1 for parts in split.values()) and len({p[depth] for p in split.values()}) == 1:
        depth += 1
    loose = [name for name in names if len(split[name]) == depth + 1]
    if len(loose) == len(names):
        return tuple(Item(name, files[name], None) for name in names), None
    if loose:
        raise SourceError(
            f"{where}: {len(loose)} images, such as {loose[0]}, lie beside the class folders; "
            "move them into one, or all images into a single folder to have no classes"
        )
    class_names = tuple(sorted({parts[depth] for parts in split.values()}))
    number = {name: label for label, name in enumerate(class_names)}
    return tuple(Item(name, files[name], number[split[name][depth]]) for name in names), class_names
