"""Damaged data: each input is read, or refused with a message of ours; nothing else happens.

`pytest -m fuzz --fuzz-minutes 10 tests/data/test_fuzz.py` tries new ones for ten minutes each.
"""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image, ImageCms

from data.formats.cifar10_pickle import load_restricted
from data.prepare.encode import BadImageError, PreparedForm, encode_image, prepare_items, square_condition
from data.shards.decode import decode_into
from data.shards.index import ShardIndex, load_index
from data.sources.find import open_source
from data.storage.location import DataError
from tests.data.conftest import open_shard
from tests.data.fuzz import altered, fuzz
from tests.data.tables import image_table, write_parquet

pytestmark = pytest.mark.fuzz
FORM = PreparedForm(size=16, channels=3, upscale=True)


def picture(number: int, kind: str = "PNG", **options: object) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def zipped(names: list[str], method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for number, name in enumerate(names):
            archive.writestr(name, picture(number))
    return stream.getvalue()


def tarred(form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        keys = {"a": ".png", "b" * 90 + "/" + "c" * 90: ".png", "é": ".jpg", "4": ""}
        for number, name in enumerate(key + end for key, suffix in keys.items() for end in (suffix, ".cls")):
            content = b"1" if name.endswith("cls") else picture(number)
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"comment": "x"}
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, images=np.zeros((5, 28, 28), np.uint8), labels=np.arange(5))
    return stream.getvalue()


def database(folder: Path) -> bytes:
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for number in range(40):
            transaction.put(b"%02d" % number, picture(number))
    return (folder / "data.mdb").read_bytes()


@pytest.fixture
def read_source(tmp_path: Path) -> Callable[[str, bytes], None]:
    """Reads all images of a source that is one file."""

    def read(name: str, content: bytes) -> None:
        file = tmp_path / name.rpartition(":")[2]
        file.write_bytes(content)
        source = open_source(name.replace(file.name, str(file)))
        assert all(isinstance(item.name, str) for item in source.items)
        for prepared in prepare_items(source, list(source.items), FORM):
            assert prepared.content if prepared.error is None else prepared.error

    return read


def test_zip(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config) -> None:
    names = ["cat/1.png", "cat/2.png", "dog/é.png", "dog/4"]
    inputs = [zipped(names, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)]
    fuzz(pytestconfig, inputs, lambda content: read_source("a.zip", content))


def test_tar(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config) -> None:
    inputs = [tarred(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    fuzz(pytestconfig, inputs, lambda content: read_source("a.tar", content))


def test_npz(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config) -> None:
    fuzz(pytestconfig, [npz()], lambda content: read_source("mnist:a.npz", content))


def test_lmdb(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config, tmp_path: Path) -> None:
    # Each input starts a process or two.
    good = database(tmp_path / "database")
    fuzz(pytestconfig, [good], lambda content: read_source("a.lmdb", content), num_inputs=20)


def test_parquet(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config, tmp_path: Path) -> None:
    table, inputs = image_table(range(30)), []
    for kind in ("snappy", "none", "zstd"):
        inputs.append(write_parquet(tmp_path / "good", table, compression=kind).read_bytes())
    inputs.append(write_parquet(tmp_path / "good", image_table(range(30), names=None)).read_bytes())
    fuzz(pytestconfig, inputs, lambda content: read_source("a.parquet", content))


def test_arrow(read_source: Callable[[str, bytes], None], pytestconfig: pytest.Config) -> None:
    table, inputs = image_table(range(30)), []
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        sink = io.BytesIO()
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        inputs.append(sink.getvalue())
    fuzz(pytestconfig, inputs, lambda content: read_source("a.arrow", content))


def test_labels(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))

    def read(labels: Any) -> None:
        (tmp_path / "dataset.json").write_text(json.dumps(labels), encoding="utf-8", errors="surrogatepass")
        source = open_source(str(tmp_path))
        assert source.class_names is None or source.items[0].label in range(len(source.class_names))

    fuzz(pytestconfig, [{"labels": [["1.png", 6], ["2.png", 0]]}, {"labels": None}], read, damage=altered)


def test_pickle(pytestconfig: pytest.Config) -> None:
    def read(content: bytes) -> None:
        # cifar10.py turns any exception into a refusal. Here it is only seen that nothing is run, and that it ends.
        try:
            load_restricted(content)
        except Exception as error:
            raise DataError(str(error)) from None

    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "filenames": ["a", "b"]}
    fuzz(pytestconfig, [pickle.dumps(batch, protocol=protocol) for protocol in (2, 4)], read, num_inputs=2000)


def test_image(pytestconfig: pytest.Config) -> None:
    def read(content: bytes) -> None:
        try:
            prepared = encode_image(content, FORM)
        except BadImageError as error:
            raise DataError(str(error)) from None
        assert Image.open(io.BytesIO(prepared)).size == (16, 16)

    exif = Image.Exif()
    exif[0x0112] = 6
    metadata = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    inputs = [picture(1, kind, **metadata) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    inputs += [picture(1, kind) for kind in ("BMP", "GIF", "PPM")]
    inputs += [picture(1, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    fuzz(pytestconfig, inputs, read, num_inputs=1500)


def test_tiff_of_many_channels(pytestconfig: pytest.Config) -> None:
    def read(content: bytes) -> None:
        try:
            planes = square_condition(content, replace(FORM, condition_channels=5))
        except BadImageError as error:
            raise DataError(str(error)) from None
        assert planes.shape == (5, 16, 16)

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 5), dtype=np.uint8)
    layouts: list[tuple[np.ndarray, dict[str, Any]]] = [
        (pixels, {"planarconfig": "contig", "rowsperstrip": 7}),
        (pixels.transpose(2, 0, 1), {"planarconfig": "separate", "compression": "zlib"}),
        (pixels.transpose(2, 0, 1).astype(">u2"), {"metadata": None}),
    ]
    inputs = []
    for array, options in layouts:
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, photometric="minisblack", **options)
        inputs.append(stream.getvalue())
    fuzz(pytestconfig, inputs, read, num_inputs=1000)


def test_index(own_copy: ShardIndex, pytestconfig: pytest.Config) -> None:
    file = own_copy.directory / "index.json"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        index = load_index(own_copy.directory)
        assert all(name.isprintable() for name in index.class_names or ())
        assert index.num_samples <= sum(shard.num_bytes for shard in index.shards) // 1024

    fuzz(pytestconfig, [file.read_bytes()], read, num_inputs=1000)


@pytest.mark.parametrize("part", ["tar", "offsets"])
def test_shard(own_copy: ShardIndex, version_1: ShardIndex, pytestconfig: pytest.Config, part: str) -> None:
    # Version 1 is scanned, since it has no offsets. Hashes are checked before training; here they are not.
    index = version_1 if part == "tar" else own_copy
    shard = index.shards[0]
    file = (index.directory / shard.name).with_suffix(f".{part}")
    pixels = np.empty((index.image_size, index.image_size, index.image_channels), dtype=np.uint8)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        reader = open_shard(index, shard)
        try:
            for number in range(shard.num_samples):
                try:
                    decode_into(pixels, reader.read(number))
                except DataError as error:
                    assert str(error).isprintable()
        finally:
            reader.close()

    fuzz(pytestconfig, [file.read_bytes()], read, num_inputs=500)
