"""Images in Parquet and Arrow tables, of any program or of Hugging Face's `datasets`.

A column holds the encoded images, structs of bytes and path, or paths from the folder of the table; another one may
hold labels. The tables are read in batches of rows. The encoded images are copied once to a file without a name, since
they are prepared in shuffled order.
"""

import errno
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from data.fetch.hub import PREFIX as HUB_PREFIX
from data.fetch.hub import fetch_tables
from data.formats.columns import Chosen, choose
from data.formats.layout import Part, note_on, parts_of, select
from data.formats.spool import Place, Spool, spool_folder
from data.formats.tables import Cell, TableError, count_rows, is_table, read_cells, read_labels, read_schema
from data.sources.classes import MAX_LABEL, Classes
from data.sources.files import FolderSource
from data.sources.source import BaseSource, Item, SourceError, State, points_outside, shown_name

_DICT_NAME, _STATE_NAME = "dataset_dict.json", "state.json"
"""What `save_to_disk` of `datasets` writes beside its Arrow files: for several splits, and for one."""
_DATA_FOLDER = "data"


class TableOptions(NamedTuple):
    """What a user says about tables; None: guessed, or refused if there are several."""

    column: str | None = None
    label: str | None = None
    subset: str | None = None
    split: str | None = None


class Table(NamedTuple):
    """One file."""

    name: str
    file: Path
    start: int
    """Number of its first row in the source."""
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class TableSource(BaseSource):
    """Rows of tables; an item's name is `FILE@ROW`."""

    description: str
    column: str
    tables: tuple[Table, ...]
    only_here: bool = True
    place: Place | None = None
    """Of the spool that another process has written."""
    first: int = 0
    """Number of the first row in it."""

    @cached_property
    def _starts(self) -> dict[str, Table]:
        return {table.name: table for table in self.tables}

    @cached_property
    def _spool(self) -> tuple[Spool, int]:
        """The open spool of this process, and the number of its first row."""
        if self.place is not None:
            try:
                return Spool.open(self.place), self.first
            except OSError as error:
                raise SourceError(
                    f"source {self.description}: its images were copied to a file of another process, which cannot be "
                    f"read any more ({error.strerror}); give the command again"
                ) from None
        first, last = self._number(self.items[0]), self._number(self.items[-1]) + 1
        try:
            return Spool.write(self._cells(first, last)), first
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SourceError(
                f"source {self.description}: its images are copied to {spool_folder()} first, which is full; free some "
                "space there, or set TMPDIR to a folder of another disk"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        spool, first = self._spool
        return super().__getstate__() | {"place": spool.place, "first": first}

    def read(self, item: Item) -> bytes:
        """The encoded image of a row."""
        spool, first = self._spool
        content, path = spool.read(self._number(item) - first)
        if content is not None:
            return content
        if path is None:
            raise OSError("it is null")
        if points_outside(path) or not path:
            raise OSError(f"its path {shown_name(path)!r} does not lead to a file below the folder of its table")
        folder = self._starts[item.name.rpartition("@")[0]].file.parent
        return FolderSource(root=folder, items=()).read(Item(path, 0, None))

    def _number(self, item: Item) -> int:
        name, _, row = item.name.rpartition("@")
        return self._starts[name].start + int(row)

    def _cells(self, first: int, last: int) -> Iterator[Cell]:
        """The cells of rows `first` to `last`, without that one."""
        for table in self.tables:
            number, end = table.start, table.start + table.num_rows
            if end <= first or number >= last:
                continue
            try:
                for cell in read_cells(table.file, self.column):
                    if first <= number < last:
                        yield cell
                    number += 1
                    if number >= last:
                        break
            except TableError as error:
                raise SourceError(f"source {table.file}: {error}") from None
            if number != min(end, last):
                raise SourceError(
                    f"source {table.file}: says that it has {table.num_rows} rows, but column {self.column} has "
                    f"{number - table.start}; get it again"
                )


def holds_tables(folder: Path) -> bool:
    """Whether a folder is a data set of `datasets`, or holds tables and no folders, or tables in its folder `data`."""
    if any((folder / name).is_file() for name in (_DICT_NAME, _STATE_NAME)):
        return True
    inner = folder / _DATA_FOLDER
    if inner.is_dir():
        return any(is_table(file.name) for file in inner.iterdir())
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "_"))]
    return any(is_table(entry.name) for entry in entries) and not any(entry.is_dir() for entry in entries)


def table_source(path: Path, options: TableOptions, *, classes: Classes) -> TableSource:
    """The tables at a path.

    Args:
        path: a table, a folder of them, or a folder that `save_to_disk` of `datasets` wrote.
        options: what to read.
        classes: none: without labels; folders: refused.

    Raises:
        SourceError: no tables, damaged ones, or not clear what to read of them.
    """
    try:
        if path.is_file():
            parts = {Part("", ""): [path.name]}
            folder = path.parent
        else:
            folder, parts = path, _saved(path) or parts_of(_names(path))
        part, names = select(parts, subset=options.subset, split=options.split)
    except TableError as error:
        raise SourceError(f"source {path}: {error}") from None
    state = State()
    files = {name: (folder / name).resolve() for name in names}
    for file in files.values():
        state.add(file)
    name = f"parquet:{path.resolve().name}"
    return rows_source(name, files, options, classes=classes, state=state.digest, note=note_on(part, parts))


def hub_source(name: str, options: TableOptions, *, classes: Classes) -> TableSource:
    """The tables of a data set on the Hugging Face Hub.

    Args:
        name: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
        options: what to read.
        classes: as for `table_source`.

    Raises:
        UserError: it cannot be fetched, or as for `table_source`.
    """
    found = fetch_tables(name, subset=options.subset, split=options.split)
    name = f"{HUB_PREFIX}{found.name}"
    return rows_source(name, found.files, options, classes=classes, state=found.state, note=found.note)


def rows_source(
    name: str, files: dict[str, Path], options: TableOptions, *, classes: Classes, state: str, note: str
) -> TableSource:
    """The rows of some tables, in the order of the files.

    Args:
        name: kind and name of the data set.
        files: place of each table by its name.
        options: the columns.
        classes: as for `table_source`.
        state: changes when the files do.
        note: what else was chosen, see `note_on`.

    Raises:
        SourceError: as for `table_source`.
    """
    if classes == "folders":
        raise SourceError(
            f"source {name}: --classes folders is given, but the classes of tables come from a column; say which one "
            "with --label NAME"
        )
    chosen, has_paths, tables, labels = None, False, [], []
    num_rows = 0
    for table, file in files.items():
        try:
            schema = read_schema(file)
            picked = choose(schema, image=options.column, label=options.label, has_classes=classes != "none")
            if chosen is not None and picked != chosen:
                raise TableError(f"its columns are not those of {next(iter(files))}; give the files of one form alone")
            chosen = picked
            has_paths = any(column.name == chosen.image and column.kind == "text" for column in schema.columns)
            tables.append(Table(table, file, num_rows, count := count_rows(file)))
            num_rows += count
            if chosen.label is not None:
                found = list(read_labels(file, chosen.label))
                if len(found) != count:
                    raise TableError(f"says that it has {count} rows, but has {len(found)} labels; get it again")
                labels += found
        except (TableError, OSError) as error:
            raise SourceError(f"source {file}: {error}") from None
    if chosen is None or not num_rows:
        raise SourceError(f"source {name}: its {len(files)} tables have no rows; get them again")
    rows = [f"{table.name}@{row}" for table in tables for row in range(table.num_rows)]
    numbers, class_names = (None, None) if chosen.label is None else _numbered(name, chosen, rows, labels)
    return TableSource(
        description=f"{name}:{chosen.image}",
        column=chosen.image,
        tables=tuple(tables),
        items=tuple(Item(row, 0, label) for row, label in zip(rows, numbers or [None] * len(rows), strict=True)),
        class_names=class_names,
        notes=(f"read: column {chosen.image}, labels {chosen.label or 'none'}{note}",),
        # Files that paths lead to may change, and are too many to ask each: then the content is compared.
        state=f"{state} {time.time_ns()}" if has_paths else state,
    )


def _numbered(
    name: str, chosen: Chosen, rows: Sequence[str], labels: Sequence[int | str | None]
) -> tuple[list[int], tuple[str, ...]]:
    """Class number of each row, and the names of the classes."""
    where, without = (
        f"source {name}: its column {chosen.label}",
        "add --classes none to take all images without classes",
    )
    missing = [row for row, label in zip(rows, labels, strict=True) if label is None]
    if missing:
        raise SourceError(
            f"{where} is null in {len(missing)} of {len(rows)} rows, such as {shown_name(missing[0])}; add the labels, "
            f"or {without}"
        )
    if all(isinstance(label, str) for label in labels):
        names = tuple(sorted({str(label) for label in labels}))
        if len(names) > MAX_LABEL:
            raise SourceError(f"{where} has {len(names)} different names, classes are at most {MAX_LABEL}; {without}")
        number = {label: place for place, label in enumerate(names)}
        return [number[str(label)] for label in labels], names
    numbers = [int(label) for label in labels if label is not None]
    for row, label in zip(rows, numbers, strict=True):
        if not 0 <= label <= MAX_LABEL:
            hint = ", which is how the test rows of some data sets are left without one" if label == -1 else ""
            raise SourceError(
                f"{where} is {label} in {shown_name(row)}{hint}; class numbers are 0 to {MAX_LABEL}; {without}"
            )
    names = chosen.class_names
    if names is None or len(names) <= max(numbers):
        names = tuple(str(number) for number in range(max(numbers) + 1))
    return numbers, names


def _names(folder: Path) -> list[str]:
    """Tables below a folder, by their paths from it."""
    names = [file.relative_to(folder) for file in folder.rglob("*") if is_table(file.name) and file.is_file()]
    visible = [name.as_posix() for name in names if not any(part.startswith((".", "_")) for part in name.parts)]
    if not visible:
        raise TableError("no .parquet and no .arrow files in it; give a table, or the folder that holds them")
    return visible


def _saved(folder: Path) -> dict[Part, list[str]] | None:
    """The parts that `save_to_disk` wrote; None if it did not write this folder."""
    if (folder / _DICT_NAME).is_file():
        splits = _field(folder / _DICT_NAME, "splits")
        if not all(isinstance(split, str) and not points_outside(split) for split in splits):
            raise TableError(f"its {_DICT_NAME} is damaged; save it again")
        return {Part("", split): _arrow_files(folder, f"{split}/") for split in splits}
    return {Part("", ""): _arrow_files(folder, "")} if (folder / _STATE_NAME).is_file() else None


def _arrow_files(folder: Path, prefix: str) -> list[str]:
    file = folder / prefix / _STATE_NAME
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in _field(file, "_data_files")]
    if not names or not all(isinstance(name, str) and is_table(name) and not points_outside(name) for name in names):
        raise TableError(f"its {prefix}{_STATE_NAME} names no Arrow files; save it again")
    return [f"{prefix}{name}" for name in names]


def _field(file: Path, name: str) -> list[Any]:
    try:
        value = json.loads(file.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, list) or not value:
        raise TableError(f"{file.name} is damaged: it has no list {name}; save the data set again")
    return value
