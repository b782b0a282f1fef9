"""What a source finds, in which order, and what it refuses."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest

from data.sources import Source, SourceError, fingerprint, open_source


def make(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return root


def pack(file: Path, *names: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return file


def listed(source: Source) -> list[tuple[str, int | None]]:
    return [(item.name, item.label) for item in source.items]


def test_digits_are_1797_images_of_ten_classes() -> None:
    source = open_source("digits")
    assert len(source.items) == 1797
    assert source.class_names == tuple("0123456789")
    assert {item.label for item in source.items} == set(range(10))
    first = source.read(source.items[0])
    # The first digit's first row is 0 0 5 13 9 1 0 0 of 16.
    assert first[:11] + first[11:19] == b"P5 8 8 255\n" + bytes([0, 0, 80, 207, 143, 16, 0, 0])
    assert pickle.loads(pickle.dumps(source)) == source


def test_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path, "b.png", "a.JPG", "notes.txt", ".hidden.png")))
    assert listed(source) == [("a.JPG", None), ("b.png", None)]
    assert source.class_names is None
    assert source.num_skipped == 2
    assert source.read(source.items[0]) == b"a.JPG"


def test_subfolders_are_the_classes_in_order_of_their_names(tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path, "dog/x/1.png", "cat/2.png", "dog/0.png")))
    assert listed(source) == [("cat/2.png", 0), ("dog/0.png", 1), ("dog/x/1.png", 1)]
    assert source.class_names == ("cat", "dog")


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 images, such as loose\.png, lie beside the class folders; move"):
        open_source(str(make(tmp_path, "dog/1.png", "cat/2.png", "loose.png")))


def test_linked_class_folder_is_read_and_a_circle_of_links_ends(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "1.png")
    root = make(tmp_path / "root", "cat/2.png")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "circle").symlink_to(root)
    assert listed(open_source(str(root))) == [("cat/2.png", 0), ("dog/1.png", 1)]


def test_zip_is_read_like_a_folder_without_its_outer_folder(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "all/dog/1.png", "all/cat/2.png", "__MACOSX/all/._1.png", "all/readme.md")
    source = open_source(str(file))
    assert listed(source) == [("all/cat/2.png", 0), ("all/dog/1.png", 1)]
    assert source.class_names == ("cat", "dog")
    assert source.num_skipped == 1
    assert source.read(source.items[1]) == b"all/dog/1.png"
    assert open_source(str(pack(tmp_path / "b.zip", "all/1.png", "all/2.png"))).class_names is None


@pytest.mark.parametrize("name", ["../out.png", "/abs.png", "a/../../out.png", "..\\out.png", "C:\\x.png"])
def test_zip_member_that_would_escape_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="points outside the archive; pack the images again"):
        open_source(str(pack(tmp_path / "a.zip", "fine.png", name)))


def test_zip_bomb_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(20 * 2**20))
    with pytest.raises(SourceError, match=r"member 'bomb\.png' would unpack to 20971520 bytes from \d+"):
        open_source(str(file))


def test_damaged_zip_is_refused(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "1.png")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SourceError, match="not a readable zip archive"):
        open_source(str(file))


def test_damaged_zip_member_is_an_error_of_that_image(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "1.png")
    file.write_bytes(file.read_bytes().replace(b"1.png1.png", b"1.png2.png"))
    source = open_source(str(file))
    with pytest.raises(OSError, match="Bad CRC-32"):
        source.read(source.items[0])


def test_missing_unknown_and_empty_sources_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    allowed = r"allowed are: digits, a folder of images, a \.zip file"
    with pytest.raises(SourceError, match=f"no such file or folder; {allowed}"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(SourceError, match=rf"unknown kind of file \.rar; {allowed}"):
        open_source(str(make(tmp_path, "x.rar") / "x.rar"))
    with pytest.raises(SourceError, match=r"no images in it \(1 other files\); known suffixes: \.bmp"):
        open_source(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with pytest.raises(SourceError, match=r"cannot read .*closed: Permission denied"):
        open_source(str(tmp_path))


def test_fingerprint_follows_names_sizes_and_labels_but_not_the_place(tmp_path: Path) -> None:
    one = make(tmp_path / "one" / "set", "a/1.png", "b/2.png")
    two = make(tmp_path / "two" / "set", "a/1.png", "b/2.png")
    base = fingerprint(open_source(str(one)))
    assert fingerprint(open_source(str(two))) == base
    make(two, "b/3.png")
    assert fingerprint(open_source(str(two))) != base
    (one / "a/1.png").write_bytes(b"longer than before")
    assert fingerprint(open_source(str(one))) != base
