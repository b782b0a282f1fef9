"""Third-party WebDataset shards, such as img2dataset's: tar files whose members share a key per sample.

The headers are read once. Images are then read at their offsets, without unpacking or scanning the archive.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.sources.source import IMAGE_SUFFIXES, BaseSource, Item, SourceError, points_outside

COMPRESSED_SUFFIXES = (".tar.bz2", ".tar.gz", ".tar.lz4", ".tar.xz", ".tar.zst", ".tbz2", ".tgz", ".txz")
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_SIDECAR_SUFFIXES = (".cls", ".json", ".txt")
"""Expected next to an image; not counted as skipped."""
_MAX_LABEL = 10**5
_MAX_CLS_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class TarSource(BaseSource):
    """Images in tar files of one folder; an item's name is `SHARD@OFFSET/MEMBER`."""

    description: str
    folder: Path

    def read(self, item: Item) -> bytes:
        """The bytes of a member."""
        shard, _, offset = item.name.partition("/")[0].rpartition("@")
        with (self.folder / shard).open("rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), item.num_bytes, int(offset))
        if len(content) != item.num_bytes:
            raise OSError(f"only {len(content)} of {item.num_bytes} bytes are left in its shard")
        return content


def tar_source(path: Path, *, max_images: int | None) -> TarSource:
    """List the images of a tar file, or of all tar files directly in a folder, sorted by file name, in archive order.

    A sample's members share the name up to the first dot. One image per sample is taken: the first whose name has no
    other dot, else the first. The rest count as skipped, as do links, devices and files with unknown suffix. Labels
    come from the `.cls` members if every image has one.

    Args:
        path: a .tar file or a folder of them.
        max_images: shards after that many images are not read.

    Raises:
        SourceError: no shards, damaged, compressed or dangerous ones, or no images.
    """
    folder, shards = _find_shards(path)
    items: list[Item] = []
    num_skipped = 0
    for shard in shards:
        listing = _list_shard(folder / shard)
        items += listing.items
        num_skipped += listing.num_skipped
        if max_images is not None and len(items) >= max_images:
            break
    items = items[:max_images]
    if not items:
        raise SourceError(
            f"source {path}: no images in its {len(shards)} shards ({num_skipped} other files); "
            f"known suffixes: {' '.join(IMAGE_SUFFIXES)}"
        )
    labels = [item.label for item in items if item.label is not None]
    if len(labels) < len(items):
        class_names = None
        items = [item._replace(label=None) for item in items]
    else:
        class_names = tuple(str(number) for number in range(max(labels) + 1))
    return TarSource(
        description=f"webdataset:{path.resolve().name}",
        folder=folder,
        items=tuple(items),
        class_names=class_names,
        num_skipped=num_skipped,
    )


def _find_shards(path: Path) -> tuple[Path, list[str]]:
    """The folder and the names of its shards, which may be links."""
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


@dataclass
class _Sample:
    images: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and size."""
    label: int | None = None


class _Listing(NamedTuple):
    items: list[Item]
    num_skipped: int


def _list_shard(shard: Path) -> _Listing:
    samples: dict[str, _Sample] = {}
    num_skipped = 0
    for member in _members(shard):
        path = PurePosixPath(member.name)
        suffix = path.suffix.lower()
        is_plain = member.isreg() and not member.issparse() and not path.name.startswith(".")
        # As in WebDataset, the sample's key ends at the first dot of the file name.
        stem, _, extension = path.name.partition(".")
        key = f"{path.parent}/{stem}"
        if is_plain and suffix in IMAGE_SUFFIXES:
            samples.setdefault(key, _Sample()).images.append((member.name, member.offset_data, member.size))
        elif is_plain and extension == "cls":
            samples.setdefault(key, _Sample()).label = _read_label(shard, member)
        elif not member.isdir() and not (is_plain and suffix in _SIDECAR_SUFFIXES):
            num_skipped += 1
    items: list[Item] = []
    for sample in samples.values():
        if sample.images:
            name, offset, size = min(sample.images, key=lambda image: PurePosixPath(image[0]).name.count(".") > 1)
            items.append(Item(f"{shard.name}@{offset}/{name}", size, sample.label))
            num_skipped += len(sample.images) - 1
    return _Listing(items, num_skipped)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
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
            # tarfile mistakes a damaged header, or a cut between two members, for the end.
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise SourceError(f"{where}: is cut off or damaged at byte {end}; get it again")
    # A malicious tar file can nest its headers.
    except (tarfile.TarError, OSError, RecursionError) as error:
        raise SourceError(f"{where}: no readable tar file ({error}); get it again") from None


def _read_label(shard: Path, member: tarfile.TarInfo) -> int:
    with shard.open("rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), min(member.size, _MAX_CLS_BYTES), member.offset_data).strip()
    if member.size > _MAX_CLS_BYTES or not content.isdigit() or int(content) > _MAX_LABEL:
        raise SourceError(
            f"source {shard}: {member.name!r} holds {content!r}, expected is a class number of 0 to {_MAX_LABEL}"
        )
    return int(content)
