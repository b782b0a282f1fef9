"""What a folder or a zip of images holds, in which order, and what is refused."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import data.sources.files
from data.sources.files import FolderSource, ZipSource, folder_source, zip_source
from data.sources.source import FormDefaults, SourceError


def make(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return root


def pack(file: Path, *names: str, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return file


def listed(source: FolderSource | ZipSource) -> list[tuple[str, int | None]]:
    return [(item.name, item.label) for item in source.items]


def test_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    source = folder_source(make(tmp_path, "b.png", "a.JPG", "notes.txt", ".hidden.png"))
    assert listed(source) == [("a.JPG", None), ("b.png", None)]
    assert source.class_names is None
    assert [(skipped.num_files, skipped.suffix, skipped.reason) for skipped in source.skipped] == [
        (1, ".png", "hidden"),
        (1, ".txt", "no images"),
    ]
    assert source.defaults == FormDefaults(None, 3, False)
    assert source.description == f"folder:{tmp_path.name}"
    assert source.read(source.items[0]) == b"a.JPG"


def test_subfolders_are_the_classes_in_order_of_their_names(tmp_path: Path) -> None:
    source = folder_source(make(tmp_path, "dog/x/1.png", "cat/2.png", "dog/0.png"))
    assert listed(source) == [("cat/2.png", 0), ("dog/0.png", 1), ("dog/x/1.png", 1)]
    assert source.class_names == ("cat", "dog")


def test_imagenet_folder_of_one_split_has_its_class_folders_as_classes(tmp_path: Path) -> None:
    make(tmp_path, "train/n01440764/n01440764_10026.JPEG", "train/n01443537/n01443537_2.JPEG")
    source = folder_source(tmp_path)
    assert source.class_names == ("n01440764", "n01443537")
    assert listed(source) == [
        ("train/n01440764/n01440764_10026.JPEG", 0),
        ("train/n01443537/n01443537_2.JPEG", 1),
    ]


@pytest.mark.parametrize("names", [("train/cat/1.png", "val/cat/2.png"), ("TEST/1.png", "validation/2.png")])
def test_splits_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match=r"its folders \w+, \w+ are splits, .* give one of them alone as the source"):
        folder_source(make(tmp_path / "set", *names))
    with pytest.raises(SourceError, match=r"are splits"):
        zip_source(pack(tmp_path / "a.zip", *names))


def test_a_class_may_be_called_test_next_to_others(tmp_path: Path) -> None:
    assert folder_source(make(tmp_path, "test/1.png", "cat/1.png")).class_names == ("cat", "test")


def test_images_next_to_class_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 images, such as loose\.png, lie next to the class folders; move"):
        folder_source(make(tmp_path, "dog/1.png", "cat/2.png", "loose.png"))


def test_linked_class_folder_is_read_and_a_circle_of_links_ends(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "1.png")
    root = make(tmp_path / "root", "cat/2.png")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "circle").symlink_to(root)
    assert listed(folder_source(root)) == [("cat/2.png", 0), ("dog/1.png", 1)]


def test_two_links_to_one_folder_are_two_classes(tmp_path: Path) -> None:
    root = make(tmp_path, "dog/1.png")
    (root / "cat").symlink_to("dog")
    assert listed(folder_source(root)) == [("cat/1.png", 0), ("dog/1.png", 1)]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    root = make(tmp_path, "cat/1.png", "dog/2.png")
    (root / "cat" / "other").symlink_to(root / "dog")
    (root / "dog" / "other").symlink_to(root / "cat")
    (root / "self").symlink_to("self")
    names = [name for name, _ in listed(folder_source(root))]
    assert names == ["cat/1.png", "cat/other/2.png", "dog/2.png", "dog/other/1.png"]


def test_what_is_no_file_is_an_error_of_that_image_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "good.png", "large.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to("missing")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(data.sources.files, "MAX_FILE_BYTES", 8)
    source = folder_source(tmp_path)
    told: dict[str, str] = {}
    for item in source.items:
        try:
            told[item.name] = source.read(item).decode()
        except OSError as error:
            told[item.name] = error.strerror or str(error)
    assert told == {
        "device.png": "it is no regular file",
        "good.png": "good.png",
        "large.png": "it has 9 bytes, allowed are 8",
        "nowhere.png": "No such file or directory",
        "pipe.png": "it is no regular file",
    }


def test_a_file_is_no_folder_and_a_folder_no_zip(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a file, a folder of images was expected"):
        folder_source(make(tmp_path, "1.png") / "1.png")
    with pytest.raises(SourceError, match="not a readable zip archive"):
        zip_source(tmp_path)


def test_zip_is_read_like_a_folder_without_its_outer_folder(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "all/dog/1.png", "all/cat/2.png", "__MACOSX/all/._1.png", "all/readme.md")
    source = zip_source(file)
    assert listed(source) == [("all/cat/2.png", 0), ("all/dog/1.png", 1)]
    assert source.class_names == ("cat", "dog")
    assert [skipped.text for skipped in source.skipped][1:] == ["1 .md (no images), such as all/readme.md"]
    assert source.description == "zip:a.zip"
    assert source.read(source.items[1]) == b"all/dog/1.png"
    assert zip_source(pack(tmp_path / "b.zip", "all/1.png", "all/2.png")).class_names is None


def test_hidden_folders_of_a_zip_are_left_out(tmp_path: Path) -> None:
    source = zip_source(pack(tmp_path / "a.zip", "cat/1.png", "dog/2.png", ".thumbs/1.png"))
    assert source.class_names == ("cat", "dog")
    assert [skipped.text for skipped in source.skipped] == ["1 .png (hidden), such as .thumbs/1.png"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_members_of_one_name_the_last_counts_and_the_others_are_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for content in (b"first", b"second", b"3rd"):
            archive.writestr("1.png", content)
    source = zip_source(tmp_path / "a.zip")
    assert [(item.name, item.num_bytes) for item in source.items] == [("1.png", 3)]
    assert source.read(source.items[0]) == b"3rd"
    assert [skipped.text for skipped in source.skipped] == [
        "2 .png (replaced by a later file of the same name), such as 1.png"
    ]


def test_member_that_is_gone_is_an_error_of_that_image(tmp_path: Path) -> None:
    source = zip_source(pack(tmp_path / "a.zip", "1.png"))
    pack(tmp_path / "a.zip", "2.png")
    with pytest.raises(OSError, match=r"cannot unpack: .*1\.png"):
        source.read(source.items[0])


def test_opened_zip_can_be_pickled_and_read_again(tmp_path: Path) -> None:
    source = zip_source(pack(tmp_path / "a.zip", *(f"{number:04d}.png" for number in range(1000))))
    item = source.items[7]
    assert source.read(item) == b"0007.png"
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(item) == b"0007.png"


@pytest.mark.parametrize("name", ["../out.png", "/abs.png", "a/../../out.png", "..\\out.png", "C:\\x.png"])
def test_zip_member_that_would_escape_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="points outside the archive; pack the images again"):
        zip_source(pack(tmp_path / "a.zip", "fine.png", name))


def test_zip_bomb_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(20 * 2**20))
    with pytest.raises(SourceError, match=r"member 'bomb\.png' would unpack to 20971520 bytes from \d+"):
        zip_source(file)


def test_damaged_zip_is_refused(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "1.png")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SourceError, match="not a readable zip archive"):
        zip_source(file)


def test_damaged_zip_member_is_an_error_of_that_image(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "1.png")
    file.write_bytes(file.read_bytes().replace(b"1.png1.png", b"1.png2.png"))
    source = zip_source(file)
    with pytest.raises(OSError, match="Bad CRC-32"):
        source.read(source.items[0])


def test_member_that_does_not_unpack_is_an_error_of_that_image(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", "1.png", "2.png", method=zipfile.ZIP_DEFLATED)
    content = bytearray(file.read_bytes())
    # The first member's data follow its header of 30 bytes and its name; this block type does not exist.
    content[30 + len("1.png")] = 0xFF
    file.write_bytes(content)
    source = zip_source(file)
    with pytest.raises(OSError, match="cannot unpack: Error -3 while decompressing"):
        source.read(source.items[0])
    assert source.read(source.items[1]) == b"2.png"


def test_damaged_directory_of_a_zip_is_refused(tmp_path: Path) -> None:
    content = pack(tmp_path / "a.zip", "a.png", "é.png").read_bytes()
    entry, name = content.index(b"PK\1\2"), content.rindex("é".encode())
    for place, value, message in (
        (entry + 6, 100, r"zip file version 10\.0"),
        (name + 1, ord("("), "codec can't decode"),
        (content.rindex(b"PK\5\6") + 10, 3, "says that it has 3 members, its directory lists 2"),
    ):
        damaged = bytearray(content)
        damaged[place] = value
        (tmp_path / "a.zip").write_bytes(damaged)
        with pytest.raises(SourceError, match=message):
            zip_source(tmp_path / "a.zip")


def test_joined_zips_are_refused_and_a_program_before_a_zip_is_not(tmp_path: Path) -> None:
    first, second = (pack(tmp_path / f"{name}.zip", f"{name}.png").read_bytes() for name in "ab")
    (tmp_path / "joined.zip").write_bytes(first + second)
    with pytest.raises(SourceError, match="begins with members that its directory does not list, as two zip files"):
        zip_source(tmp_path / "joined.zip")
    (tmp_path / "program.zip").write_bytes(b"#!/bin/sh\nexit\n" + second)
    assert listed(zip_source(tmp_path / "program.zip")) == [("b.png", None)]


def test_image_without_a_suffix_is_read_from_folder_and_zip(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "JPEG")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "4").write_bytes(stream.getvalue())
    os.mkfifo(tmp_path / "set" / "pipe")
    assert listed(folder_source(tmp_path / "set")) == [("4", None)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("4", stream.getvalue())
    assert listed(zip_source(tmp_path / "a.zip")) == [("4", None)]


def test_folder_whose_images_are_mostly_of_an_unread_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.heic", "b.heic", "c.jpg")
    with pytest.raises(SourceError, match=r"more would be lost than the 1 images .*: 2 \.heic \(HEIC, which"):
        folder_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("train2017/1.png", "val2017/2.png"), "splits"),
        (("trainA/1.png", "trainB/2.png"), "splits"),
        (("Training/1.png", "Testing/2.png"), "splits"),
        (("images/1.png", "masks/1.png"), "images and what belongs to them"),
        (("00000/1.png", "00001/2.png"), "numbered parts"),
    ],
)
def test_folders_that_are_no_classes_are_refused_unless_told(tmp_path: Path, names: tuple[str, ...], what: str) -> None:
    root, file = make(tmp_path / "set", *names), pack(tmp_path / "a.zip", *names)
    for read in (
        lambda classes: folder_source(root, classes=classes),
        lambda classes: zip_source(file, classes=classes),
    ):
        with pytest.raises(SourceError, match=f"are {what}, which are not classes; .*--classes none"):
            read("auto")
        assert read("none").class_names is None
        assert len(read("folders").class_names or ()) == 2


def test_labels_of_dataset_json_are_the_classes(tmp_path: Path) -> None:
    root = make(tmp_path, "00000/1.png", "00001/2.png")
    (root / "dataset.json").write_text('{"labels": [["00000/1.png", 2], ["00001/2.png", 0]]}')
    source = folder_source(root)
    assert (listed(source), source.class_names) == ([("00000/1.png", 2), ("00001/2.png", 0)], ("0", "1", "2"))
    (root / "dataset.json").write_text('{"labels": null}')
    assert folder_source(root).class_names is None
    (root / "dataset.json").write_text('{"labels": [["00000/1.png", 2]]}')
    with pytest.raises(SourceError, match=r"dataset\.json has no label for 1 of 2 images, such as 00001/2\.png"):
        folder_source(root)


def test_zip_of_stylegan_is_labelled_and_its_numbered_folders_are_no_classes(tmp_path: Path) -> None:
    names = ("00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")
    for labels, labelled in (([6, 0, 6], True), (None, False)):
        file = pack(tmp_path / f"{labelled}.zip", *names)
        with zipfile.ZipFile(file, "a") as archive:
            pairs = labels and [[name, label] for name, label in zip(names, labels, strict=True)]
            archive.writestr("dataset.json", json.dumps({"labels": pairs}))
        source = zip_source(file)
        assert [item.label for item in source.items] == (labels or [None] * 3)
        assert source.class_names == (tuple("0123456") if labelled else None)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([["1.png", [0.5, 1.0]]], r"gives 1\.png a list of 2 numbers, but classes are numbers of 0 to 100000"),
        ([["1.png", 0.5]], r"has no class number of 0 to 100000 for 1\.png; mend it, or add --classes none"),
        ([["1.png", True]], r"has no class number of 0 to 100000 for 1\.png"),
        ([["1.png", -1]], r"has no class number of 0 to 100000 for 1\.png"),
        ({"1.png": 3}, r"is damaged: its labels are no list of \[name, class number\]; mend it"),
        (["1.png"], "is damaged: its labels are no list"),
        (7, "is damaged: its labels are no list"),
    ],
)
def test_labels_of_dataset_json_that_are_no_class_numbers_are_refused(
    tmp_path: Path, labels: object, words: str
) -> None:
    root = make(tmp_path, "1.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(SourceError, match=rf"dataset\.json {words}"):
        folder_source(root)
    assert folder_source(root, classes="none").class_names is None


def test_backslashes_of_a_zip_separate_folders_and_system_folders_are_left_out(tmp_path: Path) -> None:
    assert zip_source(pack(tmp_path / "a.zip", "p\\cat\\1.png", "p\\dog\\1.png")).class_names == ("cat", "dog")
    root = make(tmp_path / "set", "cat/1.png", "dog/1.png", "@eaDir/1.png")
    (root / "empty").mkdir()
    source = folder_source(root)
    assert source.class_names == ("cat", "dog")
    assert source.notes == ("folders without images, which are not classes: empty",)
