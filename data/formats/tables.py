"""Tables in Parquet and Arrow files, read in batches of rows, so that memory does not grow with a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow",)
Kind = Literal["bytes", "image", "text", "number", "other"]
"""bytes: encoded images; image: structs of bytes and path, as Hugging Face's `datasets` writes; text; whole numbers."""
BATCH_ROWS = 32
"""Rows that are in memory at a time where a column may hold images."""
_LABEL_ROWS = 2**16
_BUFFER_BYTES = 2**20
_ARROW_FILE = b"ARROW1\0\0"
_MAX_METADATA_BYTES = 100 * 2**20
_MAX_FEATURES_BYTES = 64 * 2**20


class TableError(ValueError):
    """A table cannot be read; the message says why, without the name of the file."""


class Column(NamedTuple):
    """One column of a table."""

    name: str
    kind: Kind
    type: str
    """Arrow's name of its type."""


class Schema(NamedTuple):
    """What a table says about itself."""

    columns: tuple[Column, ...]
    features: dict[str, Any]
    """Feature of each column in the metadata of Hugging Face's `datasets`; empty without them."""


class Cell(NamedTuple):
    """What a column that may hold images holds in one row."""

    content: bytes | None
    """An encoded image."""
    path: str | None
    """Where it is, if there is no content."""


def is_table(name: str) -> bool:
    """Whether a file is a table by its name."""
    return name.lower().endswith((*PARQUET_SUFFIXES, *ARROW_SUFFIXES))


def read_schema(file: Path) -> Schema:
    """The columns of a table.

    Raises:
        TableError: it cannot be read.
    """
    with _opened(file) as table:
        schema = table.schema_arrow if isinstance(table, pq.ParquetFile) else table.schema
        columns = tuple(Column(field.name, _kind(field.type), str(field.type)) for field in schema)
        return Schema(columns, _features(schema.metadata or {}))


def count_rows(file: Path) -> int:
    """The rows of a table; raises TableError."""
    with _opened(file) as table:
        if isinstance(table, pq.ParquetFile):
            count = table.metadata.num_rows
        else:
            count = sum(batch.num_rows for batch in _batches(table, None, _LABEL_ROWS))
    if not 0 <= count <= (size := file.stat().st_size):  # no table of images has less than a byte for each
        raise TableError(f"says that it has {count} rows, in {size} bytes; get it again")
    return count


def read_labels(file: Path, column: str) -> Iterator[int | str | None]:
    """A column of whole numbers or texts, row by row; raises TableError."""
    with _opened(file) as table:
        for batch in _batches(table, column, _LABEL_ROWS):
            for value in _plain(batch.column(0)).to_pylist():
                yield int(value) if isinstance(value, bool) else value


def read_cells(file: Path, column: str) -> Iterator[Cell]:
    """A column of bytes, structs of bytes and path, or paths, row by row; raises TableError."""
    with _opened(file) as table:
        for batch in _batches(table, column, BATCH_ROWS):
            values = _plain(batch.column(0))
            contents, paths = values, [None] * len(values)
            if pa.types.is_struct(values.type):
                # `flatten`, unlike `field`, takes a missing struct for missing fields.
                fields = dict(zip((field.name for field in values.type), values.flatten(), strict=True))
                contents = fields["bytes"]
                paths = fields["path"].to_pylist() if "path" in fields else paths
            elif _kind(values.type) == "text":
                contents, paths = [None] * len(values), values.to_pylist()
            for content, path in zip(contents, paths, strict=True):
                yield Cell(None if content is None else content.as_py(), path)


def _batches(table: Any, column: str | None, rows: int) -> Iterator[pa.RecordBatch]:
    """One column in batches; of Arrow files all columns without one, as their batches are read as a whole."""
    if isinstance(table, pq.ParquetFile):
        yield from table.iter_batches(rows, columns=[column], use_threads=False)
        return
    is_file = isinstance(table, pa.RecordBatchFileReader)
    for batch in map(table.get_batch, range(table.num_record_batches)) if is_file else table:
        batch.validate(full=True)  # offsets of a damaged file would lead anywhere in memory
        whole = batch if column is None else batch.select([column])
        for start in range(0, whole.num_rows, rows):
            yield whole.slice(start, rows)


def _plain(values: pa.Array) -> pa.Array:
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open table. Whatever the library raises becomes a TableError."""
    try:
        with file.open("rb") as stream:
            if file.name.lower().endswith(PARQUET_SUFFIXES):
                with pq.ParquetFile(
                    stream,
                    buffer_size=_BUFFER_BYTES,
                    pre_buffer=False,
                    thrift_string_size_limit=_MAX_METADATA_BYTES,
                ) as table:
                    yield table
            else:
                yield _open_arrow(stream)
    except TableError:
        raise
    # A damaged file raises nearly anything, such as UnicodeDecodeError for a name, or asks for impossible memory.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TableError(f"cannot be read: {reason[:300].removesuffix('.')}; get it again") from None


def _open_arrow(stream: IO[bytes]) -> Any:
    start = stream.read(len(_ARROW_FILE))
    stream.seek(0)
    return pa.ipc.open_file(stream) if start == _ARROW_FILE else pa.ipc.open_stream(stream)


def _kind(of: pa.DataType) -> Kind:
    types = pa.types
    if types.is_dictionary(of):
        return _kind(of.value_type)
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return "bytes"
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return "text"
    if types.is_integer(of) or types.is_boolean(of):
        return "number"
    if types.is_struct(of):
        # A field that is null in all rows may have no other type.
        kinds = {field.name: "text" if types.is_null(field.type) else _kind(field.type) for field in of}
        if len(kinds) == of.num_fields and kinds.get("bytes") == "bytes" and kinds.get("path", "text") == "text":
            return "image"
    return "other"


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    text = metadata.get(b"huggingface", b"")
    if len(text) > _MAX_FEATURES_BYTES:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}
