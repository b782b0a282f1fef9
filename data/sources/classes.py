"""Which class each image has: by the folder it lies in, or by the dataset.json of StyleGAN and EDM."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from data.sources.source import Item, SourceError, shown_name

Classes = Literal["auto", "folders", "none"]
"""auto: folders where they are clearly classes; folders: each folder is a class; none: no classes."""
LABELS_NAME = "dataset.json"
MAX_LABEL = 10**5
SYSTEM_FOLDERS = frozenset({
    "@eaDir", "@Recently-Snapshot", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information",
    "__MACOSX", "__pycache__", "lost+found",
})  # fmt: skip
"""Folders of file servers and systems. Their images are thumbnails, deleted files or copies."""
_SPLIT = re.compile(
    r"(?P<kind>train|trn|test|tst|val|dev|eval|holdout|unlabell?ed|extra)(ing|id|idation|uation)?"
    r"([-_ ]?(set|split|data|images?|imgs?|only|small|full|[ab]|\d{1,4}))*"
)
_BUCKET = re.compile(r"\d{4,}")
# fmt: off
_IMAGES = frozenset({
    "frames", "image", "images", "img", "imgs", "input", "inputs", "jpegimages", "photos", "pictures", "rgb",
})
_NO_PICTURES = frozenset({
    "alpha", "annotation", "annotations", "depth", "edges", "ground_truth", "groundtruth", "gt", "instances", "label",
    "labels", "mask", "masks", "matte", "mattes", "seg", "segmentation", "segmentationclass", "segmentationobject",
    "segmentations", "semantic", "target", "targets", "thumbnails", "thumbs", "trimaps",
})
# fmt: on
_SHOWN = 5


class Labelled(NamedTuple):
    """Images with their classes."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    """What the user should know about them."""


def classify(
    where: str,
    files: Mapping[str, int],
    path_of: Callable[[str], str],
    *,
    folders: Iterable[str] = (),
    classes: Classes,
    give_part: Callable[[str], str],
    allow_loose: bool = False,
) -> Labelled:
    """Number the classes: the first folder of each path below the common folder, in the order of their names.

    Args:
        where: the source, for messages.
        files: size of each image by name, in the order of the items.
        path_of: the path of a name, with `/`.
        folders: paths of all folders, to name those without images.
        classes: how folders are taken.
        allow_loose: images next to folders mean that there are no classes.
        give_part: what to do to give a folder alone as the source, for a message.

    Raises:
        SourceError: the folders are not clearly classes.
    """
    parts = {name: tuple(path_of(name).split("/")) for name in files}
    if classes == "none":
        return _without_classes(files)
    # An archive usually holds one top folder with all files, which is not a class.
    depth, first = 0, next(iter(parts.values()))
    while all(len(path) > depth + 1 and path[depth] == first[depth] for path in parts.values()):
        depth += 1
    loose = [name for name, path in parts.items() if len(path) == depth + 1]
    if len(loose) == len(files) or (loose and allow_loose and classes == "auto"):
        return _without_classes(files)
    if loose:
        raise SourceError(
            f"{where}: {len(loose)} images, such as {shown_name(loose[0])}, lie next to the class folders; "
            "move them into one, or all images into a single folder to have no classes, or add --classes none"
        )
    names = tuple(sorted({path[depth] for path in parts.values()}))
    common = first[:depth]
    if classes == "auto" and (reason := _no_classes(names)):
        shown = ", ".join(map(shown_name, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        advice = "" if reason == _BUCKETS else f"{give_part('/'.join((*common, _main_part(names))))}; or "
        raise SourceError(
            f"{where}: its folders {shown} are {reason}, which are not classes; {advice}"
            "add --classes none to take all images without classes, or --classes folders if they are classes"
        )
    number = {name: label for label, name in enumerate(names)}
    items = tuple(Item(name, files[name], number[path[depth]]) for name, path in parts.items())
    siblings = {path[depth] for path in (tuple(folder.split("/")) for folder in folders) if _lies_in(path, common)}
    empty = sorted(siblings.difference(names))
    note = f"folders without images, which are not classes: {_shown(empty)}"
    return Labelled(items, names, (note,) if empty else ())


def _without_classes(files: Mapping[str, int]) -> Labelled:
    return Labelled(tuple(Item(name, size, None) for name, size in files.items()), None)


def _lies_in(path: tuple[str, ...], common: tuple[str, ...]) -> bool:
    return len(path) > len(common) and path[: len(common)] == common


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown_name, names[:_SHOWN])) + rest


_SPLITS, _BUCKETS, _MASKS = "splits", "numbered parts", "images and what belongs to them"


def _no_classes(names: tuple[str, ...]) -> str | None:
    """What the folders are if they are not classes."""
    lower = {name.lower() for name in names}
    kinds = {match["kind"] for name in lower if (match := _SPLIT.fullmatch(name))}
    # A class may be called test or train, but hardly both.
    if all(_SPLIT.fullmatch(name) for name in lower) or (kinds & {"train", "trn"} and len(kinds) > 1):
        return _SPLITS
    if lower & _IMAGES and lower & _NO_PICTURES:
        return _MASKS
    if all(_BUCKET.fullmatch(name) for name in names) and len({len(name) for name in names}) == 1:
        return _BUCKETS
    return None


def _main_part(names: tuple[str, ...]) -> str:
    """The folder that a user most likely wants alone."""
    wanted = [name for name in names if name.lower() in _IMAGES or name.lower().startswith(("train", "trn"))]
    return (wanted or list(names))[0]


def labels_of(where: str, content: bytes) -> dict[str, int] | None:
    """The class of each image in a dataset.json of StyleGAN or EDM, by its path from that file.

    Returns:
        None if it is another kind of file; empty if it says that there are no labels.

    Raises:
        SourceError: damaged, or labels that are no class numbers.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise SourceError(f"{where}: its {LABELS_NAME} is damaged; get it again, or remove it") from None
    if not isinstance(document, dict) or "labels" not in document:
        return None
    labels = document["labels"]
    if labels is None:
        return {}
    without = "add --classes none to take all images without classes"
    numbers: dict[str, Any]
    try:
        numbers = {str(name).replace("\\", "/"): label for name, label in labels}
    except (TypeError, ValueError):
        raise SourceError(
            f"{where}: its {LABELS_NAME} is damaged: its labels are no list of [name, class number]; mend it, or "
            f"{without}"
        ) from None
    for name, label in numbers.items():
        if isinstance(label, list):
            raise SourceError(
                f"{where}: its {LABELS_NAME} gives {shown_name(name)} a list of {len(label)} numbers, but classes are "
                f"numbers of 0 to {MAX_LABEL}; conditions of several numbers are not read; {without}"
            )
        if type(label) is not int or not 0 <= label <= MAX_LABEL:
            raise SourceError(
                f"{where}: its {LABELS_NAME} has no class number of 0 to {MAX_LABEL} for {shown_name(name)}; "
                f"mend it, or {without}"
            )
    return numbers


def classify_by_labels(
    where: str, files: Mapping[str, int], path_of: Callable[[str], str], labels: Mapping[str, int]
) -> Labelled:
    """Take the classes from a dataset.json.

    Args:
        where: the source, for messages.
        files: size of each image by name.
        path_of: the path of a name from dataset.json's folder.
        labels: what `labels_of` gives.

    Raises:
        SourceError: an image has no label.
    """
    missing = [name for name in files if path_of(name) not in labels]
    if missing:
        raise SourceError(
            f"{where}: its {LABELS_NAME} has no label for {len(missing)} of {len(files)} images, such as "
            f"{shown_name(missing[0])}; mend it, or add --classes none to take all images without classes"
        )
    items = tuple(Item(name, size, labels[path_of(name)]) for name, size in files.items())
    return Labelled(items, tuple(str(number) for number in range(max(labels.values()) + 1)))
