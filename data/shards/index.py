"""Index of a prepared data set, in a folder or at a URL: index.json with the list of shards."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, with_config

from data.images.shown import MAX_CHANNELS, PICTURE_CHANNELS
from data.storage.location import DataError, is_remote, local_path
from data.storage.redaction import escaped, redact
from data.storage.remote import Storage

INDEX_NAME = "index.json"
FORMAT_NAME = "ddgan-shards"
FORMAT_VERSION = 2
"""The version that is written. Version 1, which has no offsets files, is still read."""
OFFSETS_SUFFIX = ".offsets"
OFFSETS_SAMPLE_BYTES = 12
MAX_IMAGE_SIZE = 8192
"""No memory holds a batch of larger images. Every decoder reads images of this size."""
_POINT_CHANNELS = 2
_MIN_SAMPLE_BYTES = 1024
"""A sample takes at least two blocks of its shard."""
_MAX_FILE_BYTES = 2**53
"""More than any file system allows."""


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Offsets:
    """The file next to a shard with the positions of its samples."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.offsets$")]
    """Name of the shard with .offsets for .tar."""
    num_bytes: PositiveInt
    """Size of the file, 12 for each sample."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the file."""

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"offsets {self.name} of shard {self.name.removesuffix(OFFSETS_SUFFIX)}.tar"


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a data set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")]
    """Plain file name next to index.json. Anything else, e.g. a path or WebDataset's `pipe:`, is refused."""
    num_samples: PositiveInt
    """Images in it."""
    num_bytes: Annotated[int, Field(gt=0, le=_MAX_FILE_BYTES)]
    """Size of the file."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the file."""
    offsets: Offsets | None = None
    """Positions of its samples; missing in version 1."""

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"shard {self.name}"

    @property
    def files(self) -> tuple["DataFile", ...]:
        """The shard and its offsets."""
        return (self,) if self.offsets is None else (self, self.offsets)


DataFile = Shard | Offsets
"""A file of a data set, with its name, size and hash."""


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class IndexDocument:
    """Content of index.json, in this order."""

    format: Literal["ddgan-shards"]
    """Identifies the file format."""
    version: Literal[1, 2]
    """Version of this format."""
    image_size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
    """Height and width of every image."""
    image_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    """1 grey, 3 RGB; 2 for points in the plane. With conditions 1 to 8."""
    num_classes: PositiveInt | None
    """Labels are 0 .. num_classes - 1; null without labels."""
    class_names: list[str] | None
    """Name of each class, in label order."""
    source: str
    """Kind and name of the source."""
    source_fingerprint: str
    """Hash over the names and sizes of the source's images."""
    options: dict[str, int | float | str | bool | None]
    """Preparation options that determine the bytes."""
    shards: Annotated[list[Shard], Field(min_length=1)]
    """The tar files."""
    condition_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = None
    """Channels of the image that is given with each image; missing in data sets that are not of pairs."""


_DOCUMENT = TypeAdapter(IndexDocument)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A prepared data set: its location and content."""

    location: str = field(repr=False)
    """Absolute folder of index.json and the shards, or their URL without a trailing slash. A URL may hold a password:
    messages use `shown_location`."""
    image_size: int
    """Height and width of every image."""
    image_channels: int
    """1 grey, 3 RGB, others up to 8 of images with a condition; 2 at 1 px: points in the plane."""
    condition_channels: int
    """Channels of the image that is given with each image, 1 to 8; 0 without."""
    num_classes: int | None
    """Number of classes, None without labels."""
    class_names: tuple[str, ...] | None
    """Name of each class, safe to print."""
    source: str
    """Kind and name of the source."""
    source_fingerprint: str
    """Hash over the names and sizes of the source's images."""
    options: dict[str, int | float | str | bool | None]
    """Preparation options that determine the bytes."""
    shards: tuple[Shard, ...]
    """The tar files."""
    version: int
    """Version of the format."""
    digest: str
    """Identifies the data set: SHA-256 of index.json in the form of version 1, with the hashes of the shards. Offsets
    follow from the shards, so both versions of a data set have the same digest."""

    @property
    def pixels_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a decoded sample: those of its image, then those that are given with it."""
        return self.image_size, self.image_size, self.image_channels + self.condition_channels

    @property
    def has_points(self) -> bool:
        """Whether its images are points in the plane: one pixel of two channels."""
        return (self.image_size, self.image_channels) == (1, 2)

    @property
    def files(self) -> tuple[DataFile, ...]:
        """All files but index.json."""
        return tuple(file for shard in self.shards for file in shard.files)

    @property
    def is_remote(self) -> bool:
        """Whether the shards must be downloaded."""
        return is_remote(self.location)

    @property
    def directory(self) -> Path:
        """Folder of a local data set.

        Raises:
            DataError: it is remote.
        """
        if self.is_remote:
            raise DataError(f"{self.shown_location} is no local folder, which is needed here: copy the data set to one")
        return Path(self.location)

    @property
    def shown_location(self) -> str:
        """The location, safe to print."""
        return redact(self.location)

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return sum(shard.num_samples for shard in self.shards)


def _parse(content: bytes, where: str) -> IndexDocument:
    """Read and check the bytes of an index.json."""
    try:
        document = _DOCUMENT.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{where}: {place}: {first['msg']}. This program reads {FORMAT_NAME} version 1 and {FORMAT_VERSION} as "
            "written by `python -m data.prepare`: prepare the data set again"
        ) from None
    names = [shard.name for shard in document.shards]
    if len(set(names)) != len(names):
        raise DataError(f"{where}: shards: a name is listed twice: prepare the data set again")
    for number, shard in enumerate(document.shards):
        if shard.num_samples * _MIN_SAMPLE_BYTES > shard.num_bytes:
            raise DataError(
                f"{where}: shards.{number}: {shard.num_bytes} bytes cannot hold {shard.num_samples} samples: prepare "
                "the data set again"
            )
        if problem := _offsets_problem(shard, document.version):
            raise DataError(f"{where}: shards.{number}.offsets: {problem}: prepare the data set again")
    if document.image_channels not in (*PICTURE_CHANNELS, _POINT_CHANNELS) and document.condition_channels is None:
        raise DataError(
            f"{where}: image_channels: only pairs have {document.image_channels}, but there are no condition_channels: "
            "prepare the data set again"
        )
    if (len(document.class_names) if document.class_names is not None else None) != document.num_classes:
        raise DataError(f"{where}: class_names do not number {document.num_classes}: prepare the data set again")
    return document


def _offsets_problem(shard: Shard, version: int) -> str:
    """Fault in the index's entry for the offsets of a shard; empty if there is none."""
    if version == 1:
        return "version 1 has none" if shard.offsets else ""
    if shard.offsets is None:
        return f"version {version} needs them"
    if shard.offsets.name != (name := offsets_name(shard.name)):
        return f"the name is {shard.offsets.name}, expected is {name}"
    if shard.offsets.num_bytes != (num_bytes := OFFSETS_SAMPLE_BYTES * shard.num_samples):
        return f"num_bytes is {shard.offsets.num_bytes}, {shard.num_samples} samples have {num_bytes}"
    return ""


def offsets_name(shard: str) -> str:
    """Name of the offsets file of a shard."""
    return shard.removesuffix(".tar") + OFFSETS_SUFFIX


def index_content(document: IndexDocument) -> dict[str, Any]:
    """What index.json holds, without the entry that only data sets of pairs have."""
    content = asdict(document)
    if document.condition_channels is None:
        del content["condition_channels"]
    return content


def _digest(document: IndexDocument, content: bytes) -> str:
    """The digest of an index.json with this content."""
    if document.version > 1:
        first = {**index_content(document), "version": 1}
        for shard in first["shards"]:
            del shard["offsets"]
        # Exactly as version 1 was written: with another digest, runs on version 1 would not resume.
        content = (json.dumps(first, indent=1, ensure_ascii=False) + "\n").encode()
    return hashlib.sha256(content).hexdigest()


def load_index(path: str | Path) -> ShardIndex:
    """Read the index of a prepared data set, but not its shards.

    Args:
        path: folder, or URL such as s3://bucket/folder or https://host/folder.

    Raises:
        DataError: the folder or its index.json is missing, unreadable or wrong.
    """
    if is_remote(path):
        storage = Storage(str(path))
        location, content = storage.url, storage.read(INDEX_NAME)
    else:
        directory = local_path(path)
        location, content = str(directory), _read_local(directory)
    return parse_index(content, location)


def parse_index(content: bytes, location: str) -> ShardIndex:
    """The index of a data set from the bytes of its index.json.

    Args:
        content: the bytes.
        location: absolute folder or URL of the data set.

    Raises:
        DataError: it is wrong.
    """
    document = _parse(content, f"{location}/{INDEX_NAME}")
    return ShardIndex(
        location=location,
        image_size=document.image_size,
        image_channels=document.image_channels,
        condition_channels=document.condition_channels or 0,
        num_classes=document.num_classes,
        class_names=None if document.class_names is None else tuple(map(escaped, document.class_names)),
        source=document.source,
        source_fingerprint=document.source_fingerprint,
        options=document.options,
        shards=tuple(document.shards),
        version=document.version,
        digest=_digest(document, content),
    )


def _read_local(directory: Path) -> bytes:
    file = directory / INDEX_NAME
    try:
        return file.read_bytes()
    except FileNotFoundError:
        missing = "it has no index.json" if directory.is_dir() else "there is no such folder"
        raise DataError(
            f"no prepared data set at {directory}: {missing}; "
            f"prepare it with: python -m data.prepare SOURCE --out {directory}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def verify_present(index: ShardIndex) -> None:
    """Check that every file of a local data set exists with its stated size; contents are not read.

    Raises:
        DataError: names the first missing or wrong file.
    """
    for stated in index.files:
        file = index.directory / stated.name
        advice = "copy it again, or remove the folder and prepare the data set again"
        try:
            found = file.stat().st_size
        except OSError as error:
            raise DataError(f"{stated.title}: cannot read {file}: {error.strerror}; {advice}") from None
        if found != stated.num_bytes:
            raise DataError(f"{stated.title}: {file} has {found} bytes, the index says {stated.num_bytes}; {advice}")
