"""Which files make a pair, and what is said about those that have no partner."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from data.sources.find import open_source
from data.sources.source import SourceError


def write(folder: Path, *names: str, level: int = 9, size: tuple[int, int] = (8, 8)) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npy":
            np.save(file, np.full((*size, 5), level, dtype=np.uint8))
        else:
            Image.new("RGB", size, (level,) * 3).save(file)
    return folder


def level_of(content: bytes) -> int:
    return np.asarray(Image.open(io.BytesIO(content))).flat[0]


def test_files_of_equal_names_up_to_the_suffix_are_a_pair(tmp_path):
    given = write(tmp_path / "a", "x/1.jpg", "2.png", "3.png", level=200)
    wanted = write(tmp_path / "b", "x/1.png", "2.png", "3.png", level=50)
    source = open_source(f"pairs:{given}:{wanted}")
    assert [item.name for item in source.items] == ["2.png", "3.png", "x/1.png"]
    assert source.description == "pairs:a:b"
    for item in source.items:
        assert level_of(source.read(item)) == 50
        assert level_of(source.read_condition(item)) == 200
    assert source.skipped == ()


def test_colons_in_the_names_of_folders_are_allowed(tmp_path):
    given, wanted = write(tmp_path / "a:1", "1.png"), write(tmp_path / "b:2", "1.png")
    assert len(open_source(f"pairs:{given}:{wanted}").items) == 1


def test_what_lacks_a_partner_is_named(tmp_path):
    given = write(tmp_path / "a", "1.png", "2.png", "3.png", "alone.png")
    wanted = write(tmp_path / "b", "1.png", "2.png", "3.png", "single.png")
    source = open_source(f"pairs:{given}:{wanted}")
    assert [item.name for item in source.items] == ["1.png", "2.png", "3.png"]
    assert [line.text for line in source.skipped] == [
        "1 .png (has no partner of this name in folder:a), such as single.png",
        "1 .png (has no partner of this name in folder:b), such as alone.png",
    ]


def test_folders_whose_names_do_not_fit_are_refused(tmp_path):
    given, wanted = write(tmp_path / "a", "1_A.png", "2_A.png"), write(tmp_path / "b", "1_B.png", "2_B.png")
    with pytest.raises(SourceError, match=r"only 0 of 2 images have a partner; names .* such as 1_B\.png"):
        open_source(f"pairs:{given}:{wanted}")


def test_spare_conditions_and_a_stray_array_do_no_harm(tmp_path):
    given, wanted = write(tmp_path / "a", *[f"{i}.png" for i in range(9)], "stats.npy"), write(tmp_path / "b", "1.png")
    source = open_source(f"pairs:{given}:{wanted}")
    assert [item.name for item in source.items] == ["1.png"]
    assert any("stats.npy" in line.text for line in source.skipped)


def test_the_folders_of_the_images_may_be_classes(tmp_path):
    names = ("x/1.png", "y/1.png")
    source = open_source(f"pairs:{write(tmp_path / 'a', *names)}:{write(tmp_path / 'b', *names)}", classes="folders")
    assert (source.class_names, [item.label for item in source.items]) == (("x", "y"), [0, 1])


def test_a_tilde_within_the_word_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a", "1.png")
    assert len(open_source("pairs:~/a:~/a").items) == 1


def test_two_conditions_of_one_name_are_refused(tmp_path):
    given, wanted = write(tmp_path / "a", "1.png", "1.jpg"), write(tmp_path / "b", "1.png")
    with pytest.raises(SourceError, match=r"folder:a has several files 1\.\*; keep one of them"):
        open_source(f"pairs:{given}:{wanted}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pairs:", "expected is pairs:CONDITIONS:IMAGES"),
        ("pairs:{0}/a", "expected is pairs:CONDITIONS:IMAGES"),
        ("pairs:{0}/a:{0}/nowhere", "no such file or folder '{0}/nowhere'"),
        ("pairs:{0}/a:" + "x" * 300, "no such file or folder 'xxx"),
        ("pairs:s3://bucket/a:s3://bucket/b", "is a URL, but pairs are read from local files; download them"),
    ],
)
def test_a_source_that_is_not_two_folders_is_refused(tmp_path, name, told):
    write(tmp_path / "a", "1.png")
    with pytest.raises(SourceError) as refused:
        open_source(name.format(tmp_path))
    assert told.format(tmp_path) in str(refused.value)


def test_conditions_may_be_arrays(tmp_path):
    given, wanted = write(tmp_path / "a", "1.npy", level=7), write(tmp_path / "b", "1.png")
    source = open_source(f"pairs:{given}:{wanted}")
    assert (np.load(io.BytesIO(source.read_condition(source.items[0]))) == 7).all()


def test_side_by_side_is_for_pairs_only(tmp_path):
    folder = write(tmp_path / "a", "1.png", size=(16, 8))
    assert len(open_source(f"pairs:{folder}", condition_half="left").items) == 1
    with pytest.raises(SourceError, match="--side-by-side is given, which is for pairs: give pairs:"):
        open_source(str(folder), condition_half="left")


def test_digits4x_gives_the_mean_of_each_block_of_a_digit():
    source = open_source("digits4x", max_images=3)
    for item in source.items:
        pixels, means = (
            np.asarray(Image.open(io.BytesIO(x))).astype(int) for x in (source.read(item), source.read_condition(item))
        )
        assert (pixels.shape, means.shape) == ((8, 8), (4, 4))
        for i in range(4):
            for j in range(4):
                block = pixels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                assert abs(means[i, j] - block.mean()) <= 0.5


def test_digitsblur_gives_each_digit_blurred_by_a_gaussian_of_one_of_its_pixels():
    source = open_source("digitsblur", max_images=3)
    for item in source.items:
        pixels, blurred = (
            np.asarray(Image.open(io.BytesIO(x))).astype(float)
            for x in (source.read(item), source.read_condition(item))
        )
        # The binomial filter of five has the variance 1, and is nearly a Gaussian.
        expected = gaussian_filter(pixels, 1.0, mode="nearest")
        assert blurred.shape == (8, 8)
        assert np.abs(blurred - expected).max() < 0.03 * 255
        assert abs(blurred - pixels).max() > 0.2 * 255


# --- members of tar files ---


def write_tar(file: Path, **members: int) -> Path:
    """PNG files of the given levels, or .npy files; `__` in a name stands for a dot."""
    with tarfile.open(file, "w") as archive:
        for name, level in members.items():
            stream = io.BytesIO()
            if name.endswith("npy"):
                np.save(stream, np.full((8, 8, 5), level, dtype=np.uint8))
            elif not name.endswith("json"):
                Image.new("RGB", (8, 8), (level,) * 3).save(stream, "PNG")
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)
    return file


def test_members_of_one_key_with_the_two_suffixes_are_a_pair(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", a__edges__png=200, a__png=50, a__json=0, b__png=51, b__edges__png=201)
    write_tar(shards / "1.tar", a__png=52, a__edges__png=202)
    source = pickle.loads(pickle.dumps(opened := open_source(f"pairs:{shards}:edges.png:.PNG")))
    assert opened.description == "pairs:shards:edges.png:png"
    levels = [(level_of(source.read_condition(x)), level_of(source.read(x))) for x in opened.items]
    assert levels == [(200, 50), (201, 51), (202, 52)]
    assert opened.skipped == ()


def test_conditions_in_tar_files_may_be_arrays_and_a_newer_member_counts(tmp_path):
    file = write_tar(tmp_path / "pairs.tar", a__npy=1, a__jpg=9)
    with tarfile.open(file, "a") as archive:
        stream = io.BytesIO()
        np.save(stream, np.full((8, 8, 5), 7, dtype=np.uint8))
        member = tarfile.TarInfo("a.npy")
        member.size = stream.tell()
        stream.seek(0)
        archive.addfile(member, stream)
    source = open_source(f"pairs:{file}:npy:jpg")
    (item,) = source.items
    assert np.load(io.BytesIO(source.read_condition(item))).flat[0] == 7
    assert [line.num_files for line in source.skipped] == [1]


def test_members_without_a_partner_and_of_other_suffixes_are_named(tmp_path):
    file = write_tar(tmp_path / "p.tar", a__seg__png=1, a__jpg=2, b__seg__png=1, b__jpg=2, c__jpg=3, a__depth__png=4)
    source = open_source(f"pairs:{file}:seg.png:jpg")
    assert [item.name.rpartition("/")[2] for item in source.items] == ["a.jpg", "b.jpg"]
    assert [line.text for line in source.skipped] == [
        "1 .png (has another suffix), such as a.depth.png",
        "1 (no suffix) (has no partner: not both .seg.png and .jpg), such as c.jpg",
    ]


@pytest.mark.parametrize(
    ("suffixes", "told"),
    [
        ("edges.png:jpg", r"only 0 keys have both \.edges\.png and \.jpg, .* other suffixes .*: \.seg\.png"),
        ("jpg:jpg", "expected are two that differ, that of the conditions first"),
        (":jpg", "expected are two that differ"),
    ],
)
def test_suffixes_that_make_no_pairs_are_refused(tmp_path, suffixes, told):
    file = write_tar(tmp_path / "p.tar", a__seg__png=1, a__jpg=2)
    with pytest.raises(SourceError, match=told):
        open_source(f"pairs:{file}:{suffixes}")


def test_classes_of_pairs_in_tar_files_are_refused(tmp_path):
    file = write_tar(tmp_path / "p.tar", a__seg__png=1, a__jpg=2)
    with pytest.raises(SourceError, match="have no classes; leave --classes out"):
        open_source(f"pairs:{file}:seg.png:jpg", classes="folders")


def test_images_may_be_arrays_of_classes_and_in_a_zip(tmp_path):
    names = ("x/1.npy", "y/1.npy")
    given, wanted = write(tmp_path / "a", "x/1.png", "y/1.png"), write(tmp_path / "b", *names)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in names:
            archive.write(wanted / name, name)
    for images in (wanted, tmp_path / "b.zip"):
        source = open_source(f"pairs:{given}:{images}", classes="folders")
        assert [(item.name, item.label) for item in source.items] == [("x/1.npy", 0), ("y/1.npy", 1)]
        assert np.load(io.BytesIO(source.read(source.items[0]))).shape == (8, 8, 5)


def test_a_folder_without_images_is_refused_by_what_images_are_called(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.txt").write_text("no image")
    with pytest.raises(SourceError, match="no images in it"):
        open_source(f"pairs:{write(tmp_path / 'a', '1.png')}:{tmp_path}/b")
