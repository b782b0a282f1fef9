"""Image files in a folder or in a zip archive."""

import os
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from data.sources.classes import LABELS_NAME, SYSTEM_FOLDERS, Classes, Labelled, classify, classify_by_labels, labels_of
from data.sources.kinds import HIDDEN, PREPARED, REPLACED, START_BYTES, SYSTEM, Reason, Skips, reason_to_skip
from data.sources.source import IMAGE_SUFFIXES, BaseSource, Item, SourceError, State, points_outside
from data.sources.tars import COMPRESSED_SUFFIXES

WhyToSkip = Callable[[str, Callable[[], bytes]], Reason | None]
"""Why a file is no image, see `reason_to_skip`."""
MAX_FILE_BYTES = 512 * 2**20
"""Of an image."""
_MAX_ZIP_RATIO = 200
"""Images hardly compress: a member that grows by more than this factor is not an image."""
_RATIO_MATTERS_BYTES = 16 * 2**20
_MAX_END_BYTES = 22 + 2**16
"""End record of a zip with the longest comment."""
_MAX_LABELS_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class FolderSource(BaseSource):
    """Image files under a folder."""

    root: Path

    @property
    def description(self) -> str:
        """`folder:NAME`."""
        return f"folder:{self.root.name}"

    def read(self, item: Item) -> bytes:
        """The bytes of an image file."""
        file = self.root / item.name
        # Check before opening: a pipe would wait for its writer, and a device never ends.
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"it has {status.st_size} bytes, allowed are {MAX_FILE_BYTES}")
        return file.read_bytes()


@dataclass(frozen=True, kw_only=True)
class ZipSource(BaseSource):
    """Images in a zip archive, read in place."""

    file: Path

    @property
    def description(self) -> str:
        """`zip:NAME`."""
        return f"zip:{self.file.name}"

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.file)

    def read(self, item: Item) -> bytes:
        """The bytes of a member; the archive stays open in this process."""
        try:
            with self._archive.open(item.name) as stream:
                # At most the checked size from the directory: the stream may be longer.
                return stream.read(item.num_bytes)
        except (OSError, MemoryError):
            raise
        # Damaged members raise nearly anything.
        except Exception as error:
            raise OSError(f"cannot unpack: {error}") from None


def folder_source(root: Path, *, classes: Classes = "auto", to_skip: WhyToSkip = reason_to_skip) -> FolderSource:
    """List the images under a folder. Links are followed. Left out are hidden files and folders, folders of the system,
    and prepared data sets.

    Args:
        root: the folder.
        classes: how its sub-folders are taken.
        to_skip: tells images from other files.

    Raises:
        SourceError: unreadable, no images, or sub-folders that are not clearly classes.
    """
    if not root.is_dir():
        raise SourceError(f"source {root}: is a file, a folder of images was expected; give the folder it lies in")
    files: dict[str, int] = {}
    folders: list[str] = []
    skips, state = Skips(), State()
    real_parents: dict[str, frozenset[str]] = {}
    try:
        # Class folders are often links. Two may lead to the same place; a link to a folder above it is a cycle.
        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
            above, real = real_parents.pop(folder, frozenset()), os.path.realpath(folder)
            if real in above:
                subfolders.clear()
                continue
            within = Path(folder).relative_to(root).as_posix()
            if within != "." and "index.json" in names and any(name.endswith(".tar") for name in names):
                skips.add(within, PREPARED)
                subfolders.clear()
                continue
            for name in SYSTEM_FOLDERS.intersection(subfolders):
                skips.add(Path(folder, name).relative_to(root).as_posix(), SYSTEM)
            subfolders[:] = sorted(
                name for name in subfolders if not name.startswith(".") and name not in SYSTEM_FOLDERS
            )
            if within != ".":
                folders.append(within)
            real_parents.update((os.path.join(folder, name), above | {real}) for name in subfolders)
            for name in sorted(names):
                file = Path(folder, name)
                relative = file.relative_to(root).as_posix()
                if (reason := to_skip(name, partial(_start_of, file))) is None:
                    files[relative] = _size(file, state)
                else:
                    # `find` has asked about tar files at the top: the user wants the other files.
                    is_known = relative == name and name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))
                    skips.add(relative, reason, 0 if is_known else _size(file))
    except OSError as error:
        raise SourceError(f"source {root}: cannot read {error.filename}: {error.strerror}") from None
    labels = None
    if (file := root / LABELS_NAME).is_file() and classes == "auto":
        state.add(file)
        labels = _read_start(file, _MAX_LABELS_BYTES)
    labelled = classify_files(
        f"source {root}",
        files,
        skips,
        classes=classes,
        folders=folders,
        labels=labels,
        give_part=lambda part: f"give one of them alone as the source, such as {root / part}",
    )
    return FolderSource(root=root.resolve(), skipped=skips.listed(), state=state.digest, **labelled._asdict())


def _raise(error: OSError) -> None:
    raise error


def _start_of(file: Path) -> bytes:
    return _read_start(file, START_BYTES)


def _read_start(file: Path, num_bytes: int) -> bytes:
    try:
        # A pipe would wait for its writer.
        if not file.is_file():
            return b""
        with file.open("rb", buffering=0) as stream:
            return stream.read(num_bytes)
    except OSError:
        return b""


def _size(file: Path, state: State | None = None) -> int:
    # A dangling link is one bad image, which `read` reports; the rest of the folder is usable.
    try:
        return file.stat().st_size if state is None else state.add(file).st_size
    except OSError:
        return 0


def zip_source(file: Path, *, classes: Classes = "auto", to_skip: WhyToSkip = reason_to_skip) -> ZipSource:
    """List the images in a zip archive, see `folder_source`.

    Raises:
        SourceError: unreadable, dangerous members, no images, or folders that are not clearly classes.
    """
    state, labels = State(), None
    try:
        state.add(file)
        with zipfile.ZipFile(file) as archive:
            _refuse_incomplete(file, archive.infolist())
            files, skips = _list_members(file, archive, to_skip)
            if classes == "auto":
                labels = _labels_file(file, archive)
            folders = [_zip_path(name).rstrip("/") for name in archive.namelist() if _is_folder(name)]
    except PermissionError:
        raise SourceError(f"source {file}: cannot be read: Permission denied; change its mode or its owner") from None
    except (SourceError, MemoryError):
        raise
    # A damaged directory raises nearly anything, e.g. NotImplementedError for an unknown version.
    except Exception as error:
        raise SourceError(f"source {file}: not a readable zip archive ({error}); download or pack it again") from None
    labelled = classify_files(
        f"source {file}",
        files,
        skips,
        classes=classes,
        folders=folders,
        labels=labels,
        path_of=_zip_path,
        give_part=lambda part: (
            f"unpack it (unzip {file} -d FOLDER) and give one of them alone as the source, such as FOLDER/{part}"
        ),
    )
    return ZipSource(file=file.resolve(), skipped=skips.listed(), state=state.digest, **labelled._asdict())


def _zip_path(name: str) -> str:
    # Some programs on Windows write their own separator.
    return name.replace("\\", "/")


def _is_folder(name: str) -> bool:
    return _zip_path(name).endswith("/") and not SYSTEM_FOLDERS.intersection(_zip_path(name).split("/"))


def _labels_file(file: Path, archive: zipfile.ZipFile) -> bytes | None:
    if LABELS_NAME not in archive.namelist():
        return None
    member = archive.getinfo(LABELS_NAME)
    if member.file_size > _MAX_LABELS_BYTES:
        raise SourceError(
            f"source {file}: its {LABELS_NAME} has {member.file_size} bytes, which are no labels; remove it"
        )
    return archive.read(member)


def _refuse_incomplete(file: Path, members: list[zipfile.ZipInfo]) -> None:
    """Compare the directory with the number of members that the archive states, and with its start."""
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(0, file.stat().st_size - _MAX_END_BYTES))
        end = stream.read()
    place = end.rfind(b"PK\5\6")
    stated = int.from_bytes(end[place + 10 : place + 12], "little")
    # The field has 16 bits. Its highest value refers to a larger one elsewhere, and some writers let it overflow.
    if stated not in (len(members) % 2**16, 2**16 - 1):
        raise SourceError(
            f"source {file}: says that it has {stated} members, its directory lists {len(members)}; "
            "download or pack it again"
        )
    if start == b"PK\3\4" and all(member.header_offset > 0 for member in members):
        raise SourceError(
            f"source {file}: begins with members that its directory does not list, as two zip files joined to one do; "
            "unpack each, and give the folder"
        )


def _list_members(file: Path, archive: zipfile.ZipFile, to_skip: WhyToSkip) -> tuple[dict[str, int], Skips]:
    """Size of each image by name, and the other files."""
    files: dict[str, int] = {}
    skips = Skips()
    for member in archive.infolist():
        _refuse_dangerous(file, member)
        path = PurePosixPath(_zip_path(member.filename))
        if _zip_path(member.filename).endswith("/"):
            continue
        if SYSTEM_FOLDERS.intersection(path.parts[:-1]):
            skips.add(member.filename, SYSTEM)
            continue
        reason: Reason | None = HIDDEN
        if not any(part.startswith(".") for part in path.parts):
            reason = to_skip(member.filename, partial(_start_of_member, archive, member))
        if reason is not None:
            skips.add(member.filename, reason, member.file_size)
        else:
            # An archive that was extended may repeat a name. The last member counts: `read` gets that one.
            if member.filename in files:
                skips.add(member.filename, REPLACED)
            files[member.filename] = member.file_size
    return files, skips


def _start_of_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as stream:
            return stream.read(START_BYTES)
    # Damaged members raise nearly anything.
    except Exception:
        return b""


def _refuse_dangerous(file: Path, member: zipfile.ZipInfo) -> None:
    where = f"source {file}: member {member.filename!r}"
    if points_outside(member.filename):
        raise SourceError(f"{where} points outside the archive; pack the images again with relative paths")
    if member.flag_bits & 0x1:
        raise SourceError(f"{where} is encrypted; pack the images again without a password")
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > MAX_FILE_BYTES or (member.file_size > _RATIO_MATTERS_BYTES and ratio > _MAX_ZIP_RATIO):
        raise SourceError(
            f"{where} would unpack to {member.file_size} bytes from {member.compress_size}, which no photograph does; "
            "remove it from the archive"
        )


def classify_files(
    where: str,
    files: dict[str, int],
    skips: Skips,
    *,
    classes: Classes,
    folders: list[str],
    labels: bytes | None,
    give_part: Callable[[str], str],
    path_of: Callable[[str], str] = str,
) -> Labelled:
    """The images of a folder or an archive in order, with their classes.

    Args:
        where: the source, for messages.
        files: size of each image by name.
        skips: the other files.
        classes: how folders are taken.
        folders: paths of all folders, to name those without images.
        labels: content of dataset.json, if there is one.
        give_part: what to do to give a folder alone as the source, for a message.
        path_of: the path of a name, with `/`.

    Raises:
        SourceError: there are no images, more would be lost than kept, or the classes are not clear.
    """
    skips.refuse_losses(where, len(files), sum(files.values()))
    if not files:
        raise SourceError(
            f"{where}: no images in it ({skips.total} other files); known suffixes: {' '.join(IMAGE_SUFFIXES)}"
        )
    files = {name: files[name] for name in sorted(files)}
    known = None if labels is None else labels_of(where, labels)
    if known:
        return classify_by_labels(where, files, path_of, known)
    if known is not None:
        classes = "none"
    return classify(where, files, path_of, folders=folders, classes=classes, give_part=give_part)
