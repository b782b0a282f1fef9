"""Tables of small pictures, as `datasets`, pandas and others write them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int) -> bytes:
    """A PNG file of 20 x 24 px; the first pixel tells the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pixels[0, 0] = number % 256
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def number_of(content: bytes) -> int:
    """What `picture` was given."""
    return Image.open(io.BytesIO(content)).getpixel((0, 0))[0]  # pyright: ignore


def featured(columns: dict[str, Any], features: dict[str, Any] | None = None) -> pa.Table:
    """A table, with the features that `datasets` keeps in its metadata."""
    table = pa.table(columns)
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    )


def image_table(
    numbers: Sequence[int], names: Sequence[str] | None = ("cat", "dog", "owl"), label: str = "label"
) -> pa.Table:
    """Images and labels in the form of `datasets`; without names as pandas has it: bytes, and whole numbers."""
    labels = [number % 3 for number in numbers]
    if names is None:
        return pa.table({"image": [picture(number) for number in numbers], label: labels})
    images = [{"bytes": picture(number), "path": None} for number in numbers]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
    return featured({"image": pa.array(images, kind), label: labels}, features)


def write_parquet(file: Path, table: pa.Table, **options: Any) -> Path:
    """A Parquet file of row groups of ten."""
    file.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"row_group_size": 10} | options
    pq.write_table(table, file, **given)
    return file


def write_hub_folder(folder: Path) -> Path:
    """A data set as it lies on the Hub: 25 rows for training in two files, and six to test."""
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", image_table(range(15)))
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", image_table(range(15, 25)))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", image_table(range(100, 106)))
    (folder / "README.md").write_text("# Pictures\n")
    return folder


def write_saved(folder: Path, table: pa.Table) -> Path:
    """What `save_to_disk` of `datasets` writes for one split: Arrow streams of batches, and two JSON files."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder
