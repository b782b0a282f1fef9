"""Which column of a table holds the images, and which the labels: as the user says, or the only one that can."""

from typing import NamedTuple

from data.formats.tables import Column, Schema, TableError

_PATH_NAMES = frozenset(
    {"file", "file_name", "file_path", "filename", "filepath", "image", "image_path", "img", "path"}
)
_LABEL_NAMES = frozenset({
    "category", "class", "class_id", "class_label", "cls", "coarse_label", "digit", "fine_label", "label", "labels",
    "target", "targets", "y",
})  # fmt: skip
_SHOWN = 30


class Chosen(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    """From the features of `datasets`, None without."""


def choose(schema: Schema, *, image: str | None, label: str | None, has_classes: bool) -> Chosen:
    """Find the columns.

    Args:
        schema: of the table.
        image: the user's `--column`, None to guess.
        label: the user's `--label`, None to guess.
        has_classes: False: no labels are read.

    Raises:
        TableError: no such column, one of the wrong type, or none or several that it may be.
    """
    columns = {column.name: column for column in schema.columns}
    if len(columns) < len(schema.columns):
        raise TableError(f"has several columns of one name: {_listed(schema.columns)}")
    if image is None:
        image = _guess_image(schema)
    elif _named(schema, columns, "--column", image).kind not in ("bytes", "image", "text"):
        raise TableError(
            f"its column {image} is {columns[image].type}, but images are bytes, structs of bytes and path, or paths; "
            f"its columns: {_listed(schema.columns)}"
        )
    if not has_classes:
        return Chosen(image, None, None)
    if label is None:
        label = _guess_label(schema, image)
    elif _named(schema, columns, "--label", label).kind not in ("number", "text"):
        raise TableError(
            f"its column {label} is {columns[label].type}, but labels are whole numbers or names; its columns: "
            f"{_listed(schema.columns)}"
        )
    names = None if label is None else _class_names(schema, label)
    return Chosen(image, label, names)


def _named(schema: Schema, columns: dict[str, Column], option: str, name: str) -> Column:
    if name not in columns:
        raise TableError(f"{option} is {name}, but there is no such column; its columns: {_listed(schema.columns)}")
    return columns[name]


def _guess_image(schema: Schema) -> str:
    said = [column.name for column in schema.columns if _feature(schema, column.name) == "Image"]
    found = said or [column.name for column in schema.columns if column.kind in ("bytes", "image")]
    found = found or [
        column.name for column in schema.columns if column.kind == "text" and column.name.lower() in _PATH_NAMES
    ]
    if len(found) == 1:
        return found[0]
    what = f"several columns may hold the images ({', '.join(found)})" if found else "no column seems to hold images"
    raise TableError(f"{what}; say which one with --column NAME; its columns: {_listed(schema.columns)}")


def _guess_label(schema: Schema, image: str) -> str | None:
    others = [column for column in schema.columns if column.kind in ("number", "text") and column.name != image]
    said = [column.name for column in others if _feature(schema, column.name) == "ClassLabel"]
    found = said or [column.name for column in others if column.name.lower() in _LABEL_NAMES]
    if len(found) < 2:
        return found[0] if found else None
    raise TableError(
        f"several columns may hold the labels ({', '.join(found)}); say which one with --label NAME, or add --classes "
        f"none to take all images without classes; its columns: {_listed(schema.columns)}"
    )


def _feature(schema: Schema, name: str) -> str | None:
    feature = schema.features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(schema: Schema, label: str) -> tuple[str, ...] | None:
    feature = schema.features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _listed(columns: tuple[Column, ...]) -> str:
    rest = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(f"{column.name} ({column.type[:60]})" for column in columns[:_SHOWN]) + rest
