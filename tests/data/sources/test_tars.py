"""WebDataset shards made by others: what is listed, where it is read, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources.source import FormDefaults, SourceError, fingerprint
from data.sources.tars import TarSource, tar_source


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), (number, 100, 200)).save(stream, "PNG")
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "/etc/passwd"
    archive.addfile(info, io.BytesIO(content))


def write(file: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    return file


def write_img2dataset(folder: Path, *, shards: int = 2, samples: int = 4) -> Path:
    """As img2dataset writes it: an image, its caption and its metadata under one key; tables next to the shards."""
    folder.mkdir()
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for sample in range(samples):
            key = f"{shard:05d}{sample:04d}"
            members[f"{key}.jpg"] = picture(shard * samples + sample)
            members[f"{key}.txt"] = b"a photograph"
            members[f"{key}.json"] = json.dumps({"key": key, "status": "success"}).encode()
        write(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_bytes(b"{}")
    return folder


def members_of(source: TarSource) -> list[str]:
    return [item.name.partition("/")[2] for item in source.items]


def refuse(path: Path, message: str) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        tar_source(path, max_images=None)
    assert "\n" not in str(refusal.value)


def test_img2dataset_folder_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "laion")
    source = tar_source(folder, max_images=None)
    assert members_of(source) == [f"{shard:05d}{sample:04d}.jpg" for shard in range(2) for sample in range(4)]
    assert [item.name.partition("@")[0] for item in source.items] == ["00000.tar"] * 4 + ["00001.tar"] * 4
    for number, item in enumerate(source.items):
        content = source.read(item)
        assert item.num_bytes == len(content)
        assert np.asarray(Image.open(io.BytesIO(content)))[3, 3].tolist() == [number, 100, 200]
    assert {item.label for item in source.items} == {None}
    assert (source.class_names, source.skipped) == (None, ())
    assert source.description == "webdataset:laion"
    assert source.defaults == FormDefaults(None, 3, False)
    assert fingerprint(tar_source(folder, max_images=None)) == fingerprint(source)


def test_single_shard_is_a_source(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "laion")
    source = tar_source(folder / "00001.tar", max_images=None)
    assert source.description == "webdataset:00001.tar"
    assert len(source.items) == 4
    assert source.read(source.items[0]) == picture(4)


def test_linked_shards_are_read_where_the_links_lead(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "blobs")
    (tmp_path / "set").mkdir()
    for name in ("b.tar", "a.tar"):
        (tmp_path / "set" / name).symlink_to(folder / ("00000.tar" if name == "b.tar" else "00001.tar"))
    source = tar_source(tmp_path / "set", max_images=None)
    assert source.items[0].name.startswith("a.tar@")
    assert [source.read(item) for item in source.items] == [picture(number) for number in (4, 5, 6, 7, 0, 1, 2, 3)]


def test_first_images_need_only_the_first_shards(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "laion", shards=3)
    (folder / "00002.tar").write_bytes(b"not looked at")
    assert len(tar_source(folder, max_images=6).items) == 6
    refuse(folder, r"00002\.tar: no readable tar file")


def test_labels_come_from_cls_members_where_every_image_has_one(tmp_path: Path) -> None:
    members = {"a.cls": b"3", "a.jpg": picture(0), "b.png": picture(1), "b.cls": b" 0\n", "alone.cls": b"9"}
    source = tar_source(write(tmp_path / "a.tar", members), max_images=None)
    assert [(item.label, source.read(item)) for item in source.items] == [(3, picture(0)), (0, picture(1))]
    assert source.class_names == ("0", "1", "2", "3")
    file = write(tmp_path / "b.tar", members | {"c.jpg": picture(2)})
    refuse(
        file, r"1 of 3 images have no label \(\.cls\), such as b\.tar@\d+/c\.jpg; add the labels, or add --classes none"
    )
    source = tar_source(file, max_images=None, classes="none")
    assert [item.label for item in source.items] == [None, None, None]
    assert source.class_names is None


@pytest.mark.parametrize("content", [b"", b"cat", b"-1", b"1.0", b"100001", b"0" * 17])
def test_label_that_is_no_class_number_is_refused(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "a.tar", {"x/a.jpg": picture(0), "x/a.cls": content})
    refuse(file, r"a\.tar: 'x/a\.cls' holds b'.*', expected is a class number of 0 to 100000")


def test_one_image_is_taken_of_each_sample_and_the_rest_is_counted(tmp_path: Path) -> None:
    members = {
        "a.seg.png": b"no photograph",
        "a.jpg": b"first",
        "a.png": b"second",
        "b.left.png": b"left",
        "b.right.png": b"right",
        "c.npy": b"",
        "dir/a.JPG": b"other folder, other sample",
    }
    source = tar_source(write(tmp_path / "a.tar", members), max_images=None)
    assert [source.read(item) for item in source.items] == [b"first", b"left", b"other folder, other sample"]
    further = "further images of a sample, by the part of the name before its first dot"
    assert [skipped.text for skipped in source.skipped] == [
        f"3 .png ({further}), such as a.seg.png",
        "1 .npy (no images), such as c.npy",
    ]


def test_dots_of_names_are_no_end_of_a_key_where_each_is_another(tmp_path: Path) -> None:
    names = [f"photo.2019.{number:02d}.jpg" for number in range(6)]
    members = {name: b"%d" % number for number, name in enumerate(names)} | {"photo.2019.00.cls": b"1"}
    source = tar_source(write(tmp_path / "a.tar", members), max_images=None, classes="none")
    assert members_of(source) == names
    assert source.skipped == ()


def test_sample_of_more_lost_images_than_kept_is_refused(tmp_path: Path) -> None:
    views = {f"{key}.{view}.png": b"x" for key in "abcdefg" for view in ("left", "middle", "right")}
    refuse(
        write(tmp_path / "a.tar", views), r"more would be lost than the 7 images.*14 \.png \(further images of a sample"
    )


def test_later_member_of_the_same_name_replaces_the_first(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    with tarfile.open(file, "a") as archive:
        add(archive, "a.jpg", b"new")
    source = tar_source(file, max_images=None)
    assert [source.read(item) for item in source.items] == [b"new", b"b"]
    assert [line.text for line in source.skipped] == [
        "1 .jpg (replaced by a later file of the same name), such as a.jpg"
    ]


def test_members_after_the_end_mark_or_a_hole_are_not_lost_in_silence(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, {f"{name}.jpg": b"x"}) for name in "ab")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    refuse(
        joined, r"something follows its end mark at byte 1024: another tar file, .*unpack it with tar --ignore-zeros"
    )
    content = bytearray(write(tmp_path / "c.tar", {"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"c"}).read_bytes())
    content[1024:1536] = bytes(512)
    (tmp_path / "c.tar").write_bytes(content)
    refuse(tmp_path / "c.tar", r"something follows its end mark at byte 1024: .*members after a damaged place")


def test_download_whose_rest_is_zeros_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", {"a.jpg": b"a"})
    os.truncate(file, 2**20)
    assert len(tar_source(file, max_images=None).items) == 1
    os.truncate(file, 3 * 2**20)
    refuse(file, r"its last 3144704 bytes are zeros, as of a download that was stopped")


def test_member_without_a_known_suffix_is_known_by_its_start(tmp_path: Path) -> None:
    source = tar_source(
        write(tmp_path / "a.tar", {"1": picture(1), "2.jfif": picture(2), "3": b"text"}), max_images=None
    )
    assert members_of(source) == ["1", "2.jfif"]
    assert [line.text for line in source.skipped] == ["1 (no suffix) (no images), such as 3"]


def test_number_that_is_none_in_a_sparse_header_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,x", "GNU.sparse.major": "0"}
        archive.addfile(info)
    refuse(tmp_path / "a.tar", r"no readable tar file \(invalid literal for int")


def test_links_devices_folders_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "./", kind=tarfile.DIRTYPE)
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            add(archive, f"./{name}.jpg", kind=kind)
        add(archive, "._a.jpg", b"of a Mac")
        for name in "abc":
            add(archive, f"./{name}.jpg", b"image")
    source = tar_source(tmp_path / "a.tar", max_images=None)
    assert members_of(source) == ["./a.jpg", "./b.jpg", "./c.jpg"]
    assert source.read(source.items[0]) == b"image"
    assert [(skipped.num_files, skipped.reason) for skipped in source.skipped] == [
        (3, "links, devices or sparse files"),
        (1, "hidden"),
    ]


def test_long_and_odd_names_are_read_at_the_right_place(tmp_path: Path) -> None:
    names = [f"{'d' * 90}/{'n' * 120}.jpg", "sch\u00f6n.jpg", "a@17.jpg"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x@5.tar", "w", format=form) as archive:
            for number, name in enumerate(names):
                add(archive, name, b"content %d" % number)
        source = tar_source(tmp_path / "x@5.tar", max_images=None)
        assert members_of(source) == names
        assert [source.read(item) for item in source.items] == [b"content 0", b"content 1", b"content 2"]


def test_pickled_source_is_small_and_reads(tmp_path: Path) -> None:
    source = tar_source(write(tmp_path / "a.tar", {f"{n:04d}.jpg": b"%d" % n for n in range(2000)}), max_images=None)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(source.items[1234]) == b"1234"


@pytest.mark.parametrize("name", ["../out.jpg", "/abs.jpg", "a/../../out.jpg", "..\\out.jpg", "C:\\x.jpg"])
def test_member_that_would_escape_is_refused(tmp_path: Path, name: str) -> None:
    refuse(write(tmp_path / "a.tar", {"fine.jpg": b"", name: b""}), "points outside the archive; pack the images again")


def test_compressed_shards_are_refused_with_advice(tmp_path: Path) -> None:
    content = write(tmp_path / "a.tar", {"a.jpg": picture(0)}).read_bytes()
    for name, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / "set").mkdir(exist_ok=True)
        file = tmp_path / "set" / f"0.tar.{name}"
        file.write_bytes(compress(content))
        for path in (file, file.parent):
            refuse(path, rf"1 compressed tar files, such as 0\.tar\.{name}, .*; unpack them to plain \.tar files")
        file.rename(tmp_path / "b.tar")
        refuse(tmp_path / "b.tar", r"is compressed and cannot be read in place; unpack it to a plain \.tar file")


def test_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    # A block of 512 bytes of header and one of content each, and the end.
    file = write(tmp_path / "00007.tar", {"a.jpg": bytes(512), "b.jpg": bytes(512)})
    whole = file.read_bytes()
    os.truncate(file, 512 + 100)
    refuse(file, r"00007\.tar: is cut off in member 'a\.jpg'; get it again")
    os.truncate(file, 1024 + 100)
    refuse(file, r"00007\.tar: is cut off or damaged at byte 1024; get it again")
    file.write_bytes(whole[:2048])
    refuse(file, r"00007\.tar: is cut off or damaged at byte 2048; get it again")
    file.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    refuse(file, r"00007\.tar: is cut off or damaged at byte 1024; get it again")
    file.write_bytes(b"")
    refuse(file, r"00007\.tar: no readable tar file \(empty file\)")
    file.write_bytes(b"no tar" * 1000)
    refuse(file, r"00007\.tar: no readable tar file \(.+\); get it again")


def test_member_of_negative_size_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = -1024
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    refuse(tmp_path / "a.tar", r"is damaged at member 'a\.jpg'")


def test_shard_that_shrinks_later_is_an_error_of_its_images(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", {"a.jpg": bytes(512), "b.jpg": bytes(512)})
    source = tar_source(file, max_images=None)
    os.truncate(file, 1536 + 100)
    assert source.read(source.items[0]) == bytes(512)
    with pytest.raises(OSError, match="only 100 of 512 bytes are left in its shard"):
        source.read(source.items[1])


def test_no_shards_and_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    refuse(tmp_path, r"no \.tar files in it; give a \.tar file, or the folder that holds them")
    write(tmp_path / "a.tar", {"a.txt": b"", "b.npy": b"", "c.cls": b"1"})
    write(tmp_path / "b.tar", {})
    refuse(tmp_path, r"no images in its 2 shards \(1 other files\); known suffixes: \.bmp")


def test_class_folders_and_names_of_a_prepared_data_set_give_the_classes(tmp_path: Path) -> None:
    members = {f"pets/{name}/0.png": picture(0) for name in ("dog", "cat")}
    source = tar_source(write(tmp_path / "a.tar", members), max_images=None)
    assert ([item.label for item in source.items], source.class_names) == ([1, 0], ("cat", "dog"))
    index = {"format": "ddgan-shards", "class_names": ["a", "b"]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    labelled = write(tmp_path / "a.tar", {"0.png": picture(0), "0.CLS": b"0"})
    assert tar_source(labelled, max_images=None).class_names == ("a", "b")
    refuse(write(tmp_path / "a.tar", {"0.png": picture(0), "0.json": b'{"label": 3}'}), "may hold a label")
