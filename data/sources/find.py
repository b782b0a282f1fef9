"""Opens the source for `data.prepare`: finds its kind from the path, or takes the kind that the user names."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast, get_args

from data.fetch.downloads import Report, no_report
from data.fetch.hub import PREFIX as HUB_PREFIX
from data.fetch.known import KNOWN, fetch_known
from data.formats.tables import is_table
from data.sources.arrays import ArraySource, PointsSource, Split, digits_source, gaussians25_source
from data.sources.cifar10 import cifar10_source, find_cifar10
from data.sources.classes import Classes
from data.sources.files import FolderSource, ZipSource, folder_source, zip_source
from data.sources.kinds import START_BYTES, foreign_kind
from data.sources.lmdbs import DATA_NAME, LmdbSource, lmdb_source
from data.sources.mnist import StackedMnistSource, holds_mnist, mnist_source, stacked_mnist_source
from data.sources.pairs import (
    BLURRED,
    PREFIX,
    REDUCED,
    PairsSource,
    Side,
    TarPairsSource,
    degraded_digits_source,
    pairs_source,
)
from data.sources.remote import Listed, RemoteSource, bring, remote_source
from data.sources.source import IMAGE_SUFFIXES, Source, SourceError, exists, filled
from data.sources.tables import TableOptions, TableSource, holds_tables, hub_source, table_source
from data.sources.tars import COMPRESSED_SUFFIXES, TarSource, tar_source
from data.storage.location import is_remote, is_url, local_path

_AnySource = (
    FolderSource
    | ZipSource
    | ArraySource
    | StackedMnistSource
    | LmdbSource
    | TarSource
    | RemoteSource
    | TableSource
    | PointsSource
    | PairsSource
    | TarPairsSource
)
_SPLIT_KINDS = ("cifar10", "mnist", "fashionmnist", "stackedmnist")
_TABLE_KINDS = ("parquet", "hf")
_KNOWN_SETS = {**{name: name for name in KNOWN}, "stackedmnist": "mnist"}
_PATH_KINDS = ("folder", "zip", *_SPLIT_KINDS, "lmdb", "webdataset", "parquet")
_CLASSES_KINDS = ("folder", "zip", "webdataset", "pairs", *_TABLE_KINDS)
_PART = re.compile(r"(.+?)[._-](\d{3}|part[._-]?\w*|a[a-z]|crdownload|aria2|download)", re.IGNORECASE)
_CIFAR100 = "is CIFAR-100, which is not read; write its images to a folder for each class, and give the folder"
_EMBEDDED = ("digits", REDUCED, BLURRED, "gaussians25")
_ALLOWED = (
    f"allowed are: {', '.join((*_EMBEDDED, *_KNOWN_SETS))}, a PATH or URL, {HUB_PREFIX}OWNER/NAME, "
    f"{PREFIX}CONDITIONS:IMAGES, or KIND:PATH with KIND one of {', '.join(_PATH_KINDS)}"
)


def open_source(
    name: str,
    *,
    split: str | None = None,
    max_images: int | None = None,
    skip_images: int = 0,
    seed: int = 0,
    classes: Classes = "auto",
    condition_half: Side | None = None,
    column: str | None = None,
    label: str | None = None,
    subset: str | None = None,
    report: Report = no_report,
) -> Source:
    """Find the images of a source.

    Args:
        name: `digits`, `digits4x`, `digitsblur` or `gaussians25`; `cifar10`, `mnist`, `fashionmnist` or `stackedmnist`,
            which are fetched; a path, whose kind is found from its content; `KIND:PATH`; or `pairs:CONDITIONS:IMAGES`.
        split: train or test of CIFAR-10 and the MNIST family, where None means train; any part of tables.
        max_images: keeps that many in the source's order; for StackedMNIST the number of triplets.
        skip_images: leaves out that many first, such as those that another data set has.
        seed: determines the triplets of StackedMNIST and the points of gaussians25; 0 .. 2**64 - 1.
        classes: how the folders of images are taken; only for a folder, a zip, WebDataset shards or pairs.
        condition_half: the half of each image that is given with the other half, for `pairs:PATH`.
        column: of tables: what holds the images; None to guess.
        label: of tables: what holds the labels; None to guess.
        subset: of tables: the part that Hugging Face calls subset or config; None to guess.
        report: is told the progress of downloads.

    Raises:
        SourceError: no such source, or nothing in it can be prepared.
    """
    if max_images is not None and max_images < 1:
        raise SourceError(f"max_images is {max_images}: allowed is 1 or more")
    if condition_half and not name.startswith(PREFIX):
        raise SourceError(f"source {name}: --side-by-side is given, which is for pairs: give {PREFIX}{name}")
    options = TableOptions(column, label, subset, split)
    kind, path, listed, is_copy = _parse(name, options, report)
    if not (path.is_file() or path.is_dir()):
        # A pipe would wait for its writer.
        raise SourceError(f"source {name}: is neither a file nor a folder; copy what it gives to a file")
    if split is not None and kind not in (*_SPLIT_KINDS, *_TABLE_KINDS):
        raise SourceError(
            f"source {name}: split {split} is given, but {kind} has no splits; leave it out "
            f"(kinds with splits: {', '.join((*_SPLIT_KINDS, *_TABLE_KINDS))})"
        )
    if kind in _SPLIT_KINDS and split not in (None, *get_args(Split)):
        raise SourceError(f"source {name}: split {split} is given, but the splits of {kind} are train and test")
    for option, value in (("column", column), ("label", label), ("subset", subset)):
        if value is not None and kind not in _TABLE_KINDS:
            raise SourceError(
                f"source {name}: --{option} {value} is given, but {kind} is no table; leave it out "
                f"(kinds of tables: {', '.join(_TABLE_KINDS)})"
            )
    if classes != "auto" and kind not in _CLASSES_KINDS:
        raise SourceError(
            f"source {name}: --classes {classes} is given, but the classes of {kind} do not come from folders; "
            f"leave it out (kinds with class folders: {', '.join(_CLASSES_KINDS)})"
        )
    last = None if max_images is None else skip_images + max_images
    if kind == "pairs":
        source = pairs_source(name, condition_half=condition_half, classes=classes)
    elif kind == "hf":
        source = hub_source(name, options, classes=classes)
    elif kind in _TABLE_KINDS:
        source = table_source(path, options, classes=classes)
    elif listed is not None:
        source = remote_source(listed, classes=classes)
    else:
        source = _open(kind, path, cast(Split | None, split), last, seed, classes)
    if len(source.items) <= skip_images:
        raise SourceError(f"source {name}: --skip-images is {skip_images}, but there are {len(source.items)} images")
    return replace(source, items=source.items[skip_images:last], only_here=source.only_here or is_copy)


def _open(
    kind: str, path: Path, split: Split | None, max_images: int | None, seed: int, classes: Classes
) -> _AnySource:
    match kind:
        case "digits":
            return digits_source()
        case "digits4x" | "digitsblur":
            return degraded_digits_source(kind)
        case "gaussians25":
            return gaussians25_source(num_points=max_images, seed=seed)
        case "folder":
            return folder_source(path, classes=classes)
        case "zip":
            return zip_source(path, classes=classes)
        case "cifar10":
            return cifar10_source(path, split=split or "train")
        case "mnist" | "fashionmnist":
            return mnist_source(path, kind=kind, split=split)
        case "stackedmnist":
            return stacked_mnist_source(path, split=split, num_triplets=max_images, seed=seed)
        case "lmdb":
            return lmdb_source(path, max_images=max_images)
        case "webdataset":
            return tar_source(path, max_images=max_images, classes=classes)
    raise AssertionError(kind)


class _Place(NamedTuple):
    """Where a source lies."""

    kind: str
    path: Path = Path()
    """The paths of pairs are in the name."""
    listed: Listed | None = None
    """Image files at a URL."""
    is_copy: bool = False
    """It was fetched to this user's cache."""


def _parse(name: str, options: TableOptions, report: Report) -> _Place:
    if name.startswith(PREFIX):
        return _Place("pairs")
    if name.startswith(HUB_PREFIX):
        return _Place("hf")
    if name in _EMBEDDED:
        return _Place(name)
    if exists(Path(name)):
        return _Place(_recognise(Path(name)), Path(name))
    if (known := _KNOWN_SETS.get(name)) is not None:
        return _Place(name, fetch_known(known, report), is_copy=True)
    # A slash before the colon means a missing path, not an unknown kind.
    named = re.fullmatch(r"([^/:]*):(.*)", name, flags=re.DOTALL)
    if is_remote(name) and is_url(name):
        return _bring(name, None, options, report)
    if named and named[1] in _PATH_KINDS and is_remote(named[2]) and is_url(named[2]):
        return _bring(named[2], named[1], options, report)
    if named is None and (place := filled(name, name)) != name:
        return _parse(place, options, report)
    if named is None:
        raise SourceError(f"source {name}: no such file or folder; {_ALLOWED}")
    kind, path = named.groups()
    if kind == "digits":
        raise SourceError(f"source {name}: digits come with scikit-learn and have no path; give just: digits")
    if kind not in _PATH_KINDS:
        if is_url(name):
            return _parse(str(local_path(name)), options, report)
        raise SourceError(f"source {name}: unknown kind {kind!r}; {_ALLOWED}")
    # The shell expands a tilde only at the start of a word.
    path = filled(path, name)
    if not path or not exists(Path(path)):
        raise SourceError(f"source {name}: no such file or folder {path!r}; {_ALLOWED}")
    return _Place(kind, Path(path))


def _bring(url: str, kind: str | None, options: TableOptions, report: Report) -> _Place:
    found = bring(url, kind, options, report)
    if isinstance(found, Listed):
        return _Place("folder", listed=found)
    return _Place(kind or _recognise(found), found, is_copy=True)


def _recognise(path: Path) -> str:
    try:
        kind = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    except OSError as error:
        place = Path(error.filename or path)
        while place != path and place != place.parent and not os.access(place.parent, os.R_OK | os.X_OK):
            place = place.parent  # the folder that may not be read, instead of a file that was looked for in it
        what = "cannot be read" if place == path else f"cannot read {place}"
        advice = "; change its mode or its owner" if isinstance(error, PermissionError) else ""
        raise SourceError(f"source {path}: {what}: {error.strerror}{advice}") from None
    if kind == "mnist":
        raise SourceError(
            f"source {path}: MNIST and Fashion-MNIST have the same files; say which one this is, or what to make of "
            f"it: mnist:{path}, fashionmnist:{path} or stackedmnist:{path}"
        )
    return kind


def _kind_of_folder(path: Path) -> str:
    if (path / DATA_NAME).is_file():
        return "lmdb"
    if find_cifar10(path) is not None:
        return "cifar10"
    if holds_mnist(path):
        return "mnist"
    if (path / "meta").is_file() and (path / "train").is_file():
        raise SourceError(f"source {path}: {_CIFAR100}")
    # A prepared data set may lie among its shards.
    names = [
        entry
        for entry in path.iterdir()
        if not entry.name.startswith((".", "_")) and not (entry / "index.json").is_file()
    ]
    if databases := sorted(entry.name for entry in names if (entry / DATA_NAME).is_file()):
        raise SourceError(
            f"source {path}: holds {len(databases)} LMDBs; give one of them alone as the source: {path / databases[0]}"
        )
    if not any(entry.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES)) for entry in names):
        has_images = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in names)
        return "parquet" if holds_tables(path) and not has_images else "folder"
    if any(entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES for entry in names):
        raise SourceError(
            f"source {path}: holds tar files next to folders or images; say what to read: webdataset:{path} or "
            f"folder:{path}"
        )
    return "webdataset"


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    start = b""
    # A pipe would wait for its writer.
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(START_BYTES)
    if foreign := foreign_kind(start):
        raise SourceError(f"source {path}: {foreign}")
    if path.name.lower().startswith("cifar-100-python") or start.startswith(b"cifar-100-python/"):
        raise SourceError(f"source {path}: {_CIFAR100}")
    if suffix == ".zip":
        return "zip"
    if suffix == ".npz":
        return "mnist"
    if suffix in (".mdb", ".lmdb"):
        return "lmdb"
    if is_table(path.name):
        return "parquet"
    if find_cifar10(path) is not None:
        return "cifar10"
    if path.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES)):
        return "webdataset"
    if zipped := re.fullmatch(r"(.+)\.z\d\d", path.name, re.IGNORECASE):
        raise SourceError(
            f"source {path}: is a part of a split zip; join them with zip -s 0 {zipped[1]}.zip --out whole.zip, and "
            "give that file"
        )
    if (part := _PART.fullmatch(path.name)) and "." in part[1]:
        raise SourceError(
            f"source {path}: is a part of a download; finish the download, or join all its parts with "
            f"cat PARTS > {part[1]}, and give that file"
        )
    raise SourceError(f"source {path}: unknown kind of file {path.suffix or '(no suffix)'}; {_ALLOWED}")
