"""LMDBs of LSUN's and CelebA-HQ's form, and databases that hold something else."""

import ctypes
import gc
import io
import mmap
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from data.sources.lmdbs import LmdbSource, lmdb_source
from data.sources.source import FormDefaults, SourceError, fingerprint

Array = npt.NDArray[np.uint8]


def picture(number: int) -> Array:
    return np.full((20, 24, 3), (number, 100, 200), dtype=np.uint8)


def encoded(pixels: Array, form: str) -> bytes:
    stream = io.BytesIO()
    if form == "WEBP":
        Image.fromarray(pixels).save(stream, form, lossless=True)
    else:
        Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def write(folder: Path, values: Mapping[bytes, bytes]) -> Path:
    with lmdb.open(str(folder), map_size=2**30) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def raw(number: int) -> bytes:
    pixels = np.empty((256, 256, 3), dtype=np.uint8)
    pixels[:, :, 0] = number
    pixels[:, :, 1] = np.arange(256)[:, None]
    pixels[:, :, 2] = np.arange(256)
    return pixels.tobytes()


def image(content: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def names(source: LmdbSource) -> list[str]:
    return [item.name for item in source.items]


def test_lsun_images_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    keys = [b"ffe1a9", b"0004ee", b"9b22c1", b"01aa"]
    folder = write(tmp_path / "church_lmdb", {key: encoded(picture(n), "WEBP") for n, key in enumerate(keys)})
    source = lmdb_source(folder, max_images=None)
    assert names(source) == ["0004ee", "01aa", "9b22c1", "ffe1a9"]
    assert [image(source.read(item))[0, 0, 0] for item in source.items] == [1, 3, 2, 0]
    assert {(item.num_bytes, item.label) for item in source.items} == {(0, None)}
    assert source.description == "lmdb:church_lmdb"
    assert source.class_names is None
    assert source.defaults == FormDefaults(None, 3, False)
    assert not (folder / "data.mdb-lock").exists()


def test_first_images_are_those_of_the_first_keys(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {b"%02da" % n: encoded(picture(n), "PNG") for n in range(30)})
    assert names(lmdb_source(folder, max_images=3)) == ["00a", "01a", "02a"]
    assert len(lmdb_source(folder, max_images=100).items) == 30


def test_keys_of_any_bytes_are_named_in_plain_text_and_found_again(tmp_path: Path) -> None:
    values = {b"a/b c.webp": 1, b"100%\0": 2, "öl".encode(): 3, b"\xff\xfe\n": 4}
    folder = write(tmp_path / "set", {key: encoded(picture(number), "PNG") for key, number in values.items()})
    source = lmdb_source(folder, max_images=None)
    assert names(source) == ["100%25%00", "a/b c.webp", "%C3%B6l", "%FF%FE%0A"]
    assert [image(source.read(item))[0, 0, 0] for item in source.items] == [2, 1, 3, 4]


def test_raw_pixels_of_celeba_hq_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write(tmp_path / "train.lmdb", {b"%d" % number: raw(number) for number in range(12)})
    source = lmdb_source(folder, max_images=11)
    assert names(source) == [str(number) for number in range(11)]
    assert {item.num_bytes for item in source.items} == {196_608}
    assert source.defaults == FormDefaults(256, 3, False)
    for number in (0, 10):
        content = source.read(source.items[number])
        assert content.startswith(b"P6 256 256 255\n")
        assert image(content).tobytes() == raw(number)


def test_encoded_celeba_hq_is_told_from_raw_by_all_its_first_values(tmp_path: Path) -> None:
    # An image file may happen to have as many bytes as raw pixels.
    values = {b"%d" % number: encoded(picture(number), "PNG") for number in range(12)}
    values[b"0"] = values[b"0"].ljust(196_608, b"\0")
    source = lmdb_source(write(tmp_path / "set", values), max_images=None)
    assert names(source) == [str(number) for number in range(12)]
    assert [image(source.read(item))[0, 0, 0] for item in source.items] == list(range(12))
    assert source.defaults.size is None


def test_raw_value_of_another_size_is_an_error_of_that_image(tmp_path: Path) -> None:
    values = {b"%d" % number: raw(number) for number in range(20)} | {b"17": b"short"}
    source = lmdb_source(write(tmp_path / "set", values), max_images=None)
    with pytest.raises(OSError, match="has 5 bytes, raw pixels are 196608"):
        source.read(source.items[17])
    assert image(source.read(source.items[18]))[0, 0, 0] == 18


def test_database_in_a_file_of_its_own_is_read_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {b"a": encoded(picture(5), "JPEG")})
    (folder / "data.mdb").rename(tmp_path / "faces.lmdb")
    source = lmdb_source(tmp_path / "faces.lmdb", max_images=None)
    assert source.description == "lmdb:faces.lmdb"
    assert image(source.read(source.items[0])).shape == (20, 24, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["faces.lmdb", "set"]


def test_pickled_source_is_small_and_reads_alongside_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {b"%04da" % n: encoded(picture(n % 256), "PNG") for n in range(1000)})
    source = lmdb_source(folder, max_images=None)
    wanted = source.read(source.items[321])
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy.read(source.items[321]) == wanted
    again = lmdb_source(folder, max_images=None)
    assert fingerprint(again) == fingerprint(source)
    assert again.read(again.items[321]) == wanted


def test_key_that_is_gone_is_an_error_of_that_image(tmp_path: Path) -> None:
    source = lmdb_source(write(tmp_path / "set", {b"a": encoded(picture(5), "JPEG")}), max_images=None)
    with pytest.raises(OSError, match="its key is gone"):
        source.read(source.items[0]._replace(name="b"))


def share_in_memory(file: Path) -> float:
    """How much of a file the kernel holds in memory."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        code = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        # The map cannot be closed while this points into it.
        del start
    if code:
        pytest.skip("this kernel does not tell what is in memory")
    return sum(page & 1 for page in pages) / len(pages)


def test_listing_the_keys_leaves_the_values_on_disk(tmp_path: Path) -> None:
    size, count = 2**17, 400
    values = {b"%04da" % n: encoded(picture(n % 256), "PNG").ljust(size, b"\0") for n in range(count)}
    folder = write(tmp_path / "set", values)
    with (folder / "data.mdb").open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_memory(folder / "data.mdb") > 0.02:
        pytest.skip("this file system keeps files in memory")
    assert len(lmdb_source(folder, max_images=None).items) == count
    # Sixteen values are looked at, and one page of any other.
    assert share_in_memory(folder / "data.mdb") < 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the LMDB is empty"),
        (
            {b"0": pickle.dumps([1, 2]), b"1": b"x"},
            r"the first 2 values of the LMDB are no images: key 0 has \d+ bytes, which begin with b'\\x80",
        ),
        ({b"0": b"RIFF\0\0\0\0WAVEfmt "}, "the first 1 values of the LMDB are no images"),
    ],
)
def test_database_of_another_kind_is_refused(tmp_path: Path, values: dict[bytes, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        lmdb_source(write(tmp_path / "set", values), max_images=None)
    assert "\n" not in str(refusal.value)


def test_named_sub_databases_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2) as environment:
        for name in (b"images", b"labels"):
            database = environment.open_db(name)
            with environment.begin(write=True, db=database) as transaction:
                transaction.put(b"0", raw(0))
    with pytest.raises(SourceError, match="holds named sub-databases, such as key images; expected is one database"):
        lmdb_source(tmp_path, max_images=None)


def test_truncated_database_is_refused_before_it_could_kill_the_process(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {b"%d" % number: raw(number) for number in range(5)}) / "data.mdb"
    whole = file.stat().st_size
    for num_bytes in (whole - 4096, whole // 2, 3 * 4096):
        os.truncate(file, num_bytes)
        with pytest.raises(SourceError, match=rf"has {num_bytes} bytes of {whole}; it is cut off\); get it again"):
            lmdb_source(file.parent, max_images=None)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x89PNG" * 4096], ids=["empty", "short", "other"])
def test_file_that_is_no_lmdb_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(SourceError, match=r"data\.mdb: no readable LMDB \(.+\); get it again"):
        lmdb_source(tmp_path, max_images=None)


def test_damaged_tree_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {b"%03d" % n: encoded(picture(n), "PNG") for n in range(200)}) / "data.mdb"
    content = bytearray(file.read_bytes())
    content[2 * 4096 :] = bytes(len(content) - 2 * 4096)
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"the LMDB is damaged \(.+\); get it again"):
        lmdb_source(file.parent, max_images=None)


def test_database_that_lists_fewer_entries_than_it_states_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {b"%02d" % n: encoded(picture(n), "PNG") for n in range(20)}) / "data.mdb"
    content = bytearray(file.read_bytes())
    for page in (0, 1):
        # The count of entries of the main database, in both copies of the head.
        place = page * 4096 + 120
        if int.from_bytes(content[place : place + 8], "little") == 20:
            content[place] = 25
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"it says that it has 25 entries, 20 can be listed"):
        lmdb_source(file.parent, max_images=None)
    assert len(lmdb_source(file.parent, max_images=7).items) == 20 - 13


def test_damage_that_makes_lmdb_end_its_process_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {b"%03d" % n: encoded(picture(n), "PNG") for n in range(100)}) / "data.mdb"
    content = bytearray(file.read_bytes())
    for page in range(2, len(content) // 4096):
        # A leaf of the tree that says that it is a branch.
        if content[page * 4096 + 10] == 2:
            content[page * 4096 + 10] = 1
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"the LMDB is damaged \(.+\); get it again"):
        lmdb_source(file.parent, max_images=None)


def readers() -> list[psutil.Process]:
    """The processes that read a database for this one."""
    children = psutil.Process().children()
    return [child for child in children if any(part.endswith("lmdb_reader.py") for part in child.cmdline())]


def test_death_of_the_reader_costs_one_image(tmp_path: Path) -> None:
    source = lmdb_source(write(tmp_path / "set", {b"a": encoded(picture(5), "JPEG")}), max_images=None)
    wanted = source.read(source.items[0])
    [child] = readers()
    child.kill()
    with pytest.raises(OSError, match="the database is damaged: reading it made LMDB end its process"):
        source.read(source.items[0])
    assert source.read(source.items[0]) == wanted


def test_reader_ends_with_its_source(tmp_path: Path) -> None:
    source = lmdb_source(write(tmp_path / "set", {b"a": encoded(picture(5), "JPEG")}), max_images=None)
    assert readers() == []
    source.read(source.items[0])
    assert len(readers()) == 1
    del source
    gc.collect()
    assert readers() == []


def test_folder_without_a_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no data\.mdb in it; give the folder that holds"):
        lmdb_source(tmp_path, max_images=None)
