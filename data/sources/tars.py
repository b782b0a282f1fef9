"""Third-party WebDataset shards, such as img2dataset's: tar files whose members share a key per sample.

The headers are read once. Images are then read at their offsets, without unpacking or scanning the archive.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from data.sources.classes import MAX_LABEL, Classes, Labelled, classify
from data.sources.kinds import FURTHER, LINK, NO_IMAGE, REPLACED, START_BYTES, Reason, Skips, reason_to_skip
from data.sources.source import IMAGE_SUFFIXES, BaseSource, Item, SourceError, State, points_outside, shown_name

COMPRESSED_SUFFIXES = (".tar.bz2", ".tar.gz", ".tar.lz4", ".tar.xz", ".tar.zst", ".tbz2", ".tgz", ".txz")
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
SIDECAR_SUFFIXES = (".cls", ".json", ".txt")
"""Expected next to an image; not counted as skipped."""
_MAX_CLS_BYTES = 16
_MAX_JSON_BYTES = 2**20
_LABEL_KEYS = ("cls", "label", "class", "class_id")
"""Keys of a .json that hold a class number in some data sets."""
_TAIL_BYTES = 2**20
"""Read at a time after the end mark. Programs fill an archive with at most as many zeros."""


@dataclass(frozen=True, kw_only=True)
class TarSource(BaseSource):
    """Images in tar files of one folder; an item's name is `SHARD@OFFSET/MEMBER`."""

    description: str
    folder: Path

    def read(self, item: Item) -> bytes:
        """The bytes of a member."""
        shard, _, offset = item.name.partition("/")[0].rpartition("@")
        return read_member(self.folder / shard, int(offset), item.num_bytes)


def read_member(shard: Path, offset: int, size: int) -> bytes:
    """The bytes of a member.

    Raises:
        OSError: the shard cannot be read, or is too short by now.
    """
    with shard.open("rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"only {len(content)} of {size} bytes are left in its shard")
    return content


def tar_source(path: Path, *, max_images: int | None, classes: Classes = "auto") -> TarSource:
    """List the images of a tar file, or of all tar files directly in a folder, sorted by file name, in archive order.

    A sample's members share the name up to the first dot. One image per sample is taken: the first whose name has no
    other dot, else the first. The rest is counted as left out. If that were most images, and what follows the first dot
    is different for each, the dots belong to the names: then a sample's members share the name up to the last dot.
    Labels come from the `.cls` members, else from the folders of the members. The class names of a prepared data set
    come from its index.json.

    Args:
        path: a .tar file or a folder of them.
        max_images: shards after that many images are not read.
        classes: how folders and labels are taken.

    Raises:
        SourceError: no shards, damaged, compressed or dangerous ones, no images, or not clearly labelled ones.
    """
    folder, shards = find_shards(path)
    items, skips = _list_shards(folder, shards, max_images, has_dots=False)
    if len(items) < skips.count(FURTHER) and skips.num_parts > len(items):
        items, skips = _list_shards(folder, shards, max_images, has_dots=True)
    skips.refuse_losses(f"source {path}", len(items), sum(item.num_bytes for item in items))
    items = items[:max_images]
    if not items:
        raise SourceError(
            f"source {path}: no images in its {len(shards)} shards ({skips.total} other files); "
            f"known suffixes: {' '.join(IMAGE_SUFFIXES)}"
        )
    labelled = _label(path, folder, items, skips, classes)
    state = State()
    for shard in shards:
        state.add(folder / shard)
    return TarSource(
        description=f"webdataset:{path.resolve().name}",
        folder=folder,
        skipped=skips.listed(),
        state=state.digest,
        **labelled._asdict(),
    )


def _label(path: Path, folder: Path, items: list[Item], skips: "_Skips", classes: Classes) -> Labelled:
    """Find the classes of the images.

    Raises:
        SourceError: some have a label, others not; or they may be in a place that is not read.
    """
    where, without = f"source {path}", "add --classes none to take all images without classes"
    unlabelled = [item for item in items if item.label is None]
    if classes != "auto" or len(unlabelled) == len(items):
        if skips.json_label and classes == "auto":
            raise SourceError(
                f"{where}: {shown_name(skips.json_label)} may hold a label, which is not read from there; write it to "
                f"a .cls member, or {without}"
            )
        members = {item.name: item.num_bytes for item in items}
        return classify(
            where,
            members,
            lambda name: name.partition("/")[2].removeprefix("./").replace("\\", "/"),
            classes=classes,
            allow_loose=True,
            give_part=lambda part: f"unpack it (tar -xf) and give one of them alone as the source, such as {part}",
        )
    if unlabelled:
        raise SourceError(
            f"{where}: {len(unlabelled)} of {len(items)} images have no label (.cls), such as "
            f"{shown_name(unlabelled[0].name)}; add the labels, or {without}"
        )
    labels = [item.label for item in items if item.label is not None]
    names = _prepared_names(folder)
    if names is None or len(names) <= max(labels):
        names = tuple(str(number) for number in range(max(labels) + 1))
    return Labelled(tuple(items), names)


def _prepared_names(folder: Path) -> tuple[str, ...] | None:
    """The class names of a prepared data set."""
    try:
        document = json.loads((folder / "index.json").read_bytes())
        names = document["class_names"] if document["format"] == "ddgan-shards" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def find_shards(path: Path) -> tuple[Path, list[str]]:
    """The folder and the names of its shards, which may be links; of a tar file, its folder and name.

    Raises:
        SourceError: there are none, or they are compressed.
    """
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    except OSError as error:
        raise SourceError(f"source {path}: cannot be read: {error.strerror}") from None
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)]
    if compressed:
        raise SourceError(
            f"source {path}: {len(compressed)} compressed tar files, such as {compressed[0]}, which cannot be read in "
            "place; unpack them to plain .tar files, e.g. with gunzip"
        )
    if not path.is_dir():
        return path.parent.resolve(), names
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards:
        raise SourceError(f"source {path}: no .tar files in it; give a .tar file, or the folder that holds them")
    return path.resolve(), shards


class _Skips(Skips):
    """Also collects what follows the first dot in names of images."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: set[str] = set()
        self.json_label = ""
        """A .json member that seems to hold a label."""

    def add_part(self, name: str) -> None:
        """Note the name of an image with more than one dot."""
        self._parts.add(name.partition(".")[2].rpartition(".")[0])

    @property
    def num_parts(self) -> int:
        """How many different ones there are."""
        return len(self._parts)


@dataclass
class _Sample:
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size by name."""
    label: int | None = None


def _list_shards(
    folder: Path, shards: list[str], max_images: int | None, *, has_dots: bool
) -> tuple[list[Item], _Skips]:
    items: list[Item] = []
    skips = _Skips()
    for shard in shards:
        items += _list_shard(folder / shard, skips, has_dots=has_dots)
        if max_images is not None and len(items) >= max_images:
            break
    return items, skips


def _list_shard(shard: Path, skips: _Skips, *, has_dots: bool) -> list[Item]:
    samples: dict[str, _Sample] = {}
    seen_json = False
    for member in members_of(shard):
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        # As in WebDataset, the sample's key ends at the first dot of the file name, unless dots belong to the names.
        stem, _, extension = path.name.rpartition(".") if has_dots else path.name.partition(".")
        sample = f"{path.parent}/{stem}"
        reason = _reason_to_skip(shard, member)
        if reason is None:
            images = samples.setdefault(sample, _Sample()).images
            # tar -r and tar -u append a newer member of the same name.
            if images.pop(member.name, None):
                skips.add(member.name, REPLACED)
            images[member.name] = (member.offset_data, member.size)
        elif reason == NO_IMAGE and extension.lower() == "cls":
            samples.setdefault(sample, _Sample()).label = _read_label(shard, member)
        elif reason == NO_IMAGE and extension.lower() == "json" and not seen_json:
            # One tells what the others hold.
            seen_json = True
            skips.json_label = skips.json_label or (member.name if _holds_label(shard, member) else "")
        elif reason != NO_IMAGE or path.suffix.lower() not in SIDECAR_SUFFIXES:
            skips.add(member.name, reason, member.size)
    items: list[Item] = []
    for sample in samples.values():
        taken = min(sample.images, key=lambda name: PurePosixPath(name).name.count(".") > 1, default="")
        for name, (offset, size) in sample.images.items():
            if name == taken:
                items.append(Item(f"{shard.name}@{offset}/{name}", size, sample.label))
            else:
                skips.add(name, FURTHER)
            skips.add_part(PurePosixPath(name).name)
    return items


def _reason_to_skip(shard: Path, member: tarfile.TarInfo) -> Reason | None:
    reason = reason_to_skip(member.name, partial(_start_of, shard, member))
    if not member.isreg() or member.issparse():
        # Their content is elsewhere, or nowhere.
        return LINK if reason is None else NO_IMAGE
    return reason


def _start_of(shard: Path, member: tarfile.TarInfo) -> bytes:
    with shard.open("rb", buffering=0) as stream:
        return os.pread(stream.fileno(), min(member.size, START_BYTES), member.offset_data)


def members_of(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a shard in order; checks that they lie within it and have safe names."""
    where = f"source {shard}"
    try:
        with shard.open("rb") as stream:
            start = stream.read(8)
            stream.seek(0)
            if start.startswith(_COMPRESSED_STARTS):
                raise SourceError(f"{where}: is compressed and cannot be read in place; unpack it to a plain .tar file")
            num_bytes = os.fstat(stream.fileno()).st_size
            end = 0
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.offset_data <= end or member.size < 0:
                        raise SourceError(f"{where}: is damaged at member {member.name!r}; get it again")
                    if member.isreg() and member.offset_data + member.size > num_bytes:
                        raise SourceError(f"{where}: is cut off in member {member.name!r}; get it again")
                    if points_outside(member.name):
                        raise SourceError(
                            f"{where}: member {member.name!r} points outside the archive; "
                            "pack the images again with relative paths"
                        )
                    end = member.offset_data
                    yield member
                end = archive.offset
            _refuse_wrong_end(where, stream, end)
    except (SourceError, MemoryError):
        raise
    # A damaged or malicious tar file raises nearly anything: ValueError for numbers, RecursionError for nested headers.
    except Exception as error:
        raise SourceError(f"{where}: no readable tar file ({error}); get it again") from None


def _refuse_wrong_end(where: str, stream: IO[bytes], end: int) -> None:
    """Check that nothing but zeros follows the last member.

    tarfile mistakes a damaged header, a cut between two members, or a block of zeros in a hole, for the end.
    """
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise SourceError(f"{where}: is cut off or damaged at byte {end}; get it again")
    while block := stream.read(_TAIL_BYTES):
        if block.strip(b"\0"):
            raise SourceError(
                f"{where}: something follows its end mark at byte {end}: another tar file, joined to it with cat, or "
                "members after a damaged place. Get it again, or unpack it with tar --ignore-zeros -xf and give the "
                "folder"
            )
    if (num_zeros := stream.tell() - end) > 2 * _TAIL_BYTES:
        raise SourceError(
            f"{where}: its last {num_zeros} bytes are zeros, as of a download that was stopped; get it again"
        )


def _read_label(shard: Path, member: tarfile.TarInfo) -> int:
    with shard.open("rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), min(member.size, _MAX_CLS_BYTES), member.offset_data).strip()
    if member.size > _MAX_CLS_BYTES or not content.isdigit() or int(content) > MAX_LABEL:
        raise SourceError(
            f"source {shard}: {member.name!r} holds {content!r}, expected is a class number of 0 to {MAX_LABEL}"
        )
    return int(content)


def _holds_label(shard: Path, member: tarfile.TarInfo) -> bool:
    with shard.open("rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), min(member.size, _MAX_JSON_BYTES), member.offset_data)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and any(type(document.get(key)) is int for key in _LABEL_KEYS)
