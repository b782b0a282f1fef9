"""Which kind of source lies at a path, what the user may force, and what is refused."""

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from data.prepare.encode import PreparedForm, prepare_items
from data.sources.find import open_source
from data.sources.source import Source, SourceError, fingerprint
from tests.launch import ROOT

ALLOWED = (
    r"allowed are: digits, digits4x, digitsblur, gaussians25, cifar10, mnist, fashionmnist, stackedmnist, "
    r"a PATH or URL, hf:OWNER/NAME, pairs:CONDITIONS:IMAGES, or KIND:PATH with KIND one of "
    r"folder, zip, cifar10, mnist, fashionmnist, stackedmnist, lmdb, webdataset, parquet"
)


def picture(number: int = 0, size: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (number, 100, 200)).save(stream, "PNG")
    return stream.getvalue()


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for number in range(5):
        (path / f"{number}.png").write_bytes(picture(number))
    return path


def make_zip(path: Path) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", picture(number))
    return path.with_suffix(".zip")


def make_lmdb(path: Path) -> Path:
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for number in range(5):
            transaction.put(b"key%d" % number, picture(number))
    return path


def make_shards(path: Path) -> Path:
    path.mkdir()
    with tarfile.open(path / "00000.tar", "w") as archive:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(picture(number))
            archive.addfile(info, io.BytesIO(picture(number)))
    (path / "00000.parquet").write_bytes(b"PAR1")
    (path / "_tmp").mkdir()
    return path


def make_mnist(path: Path) -> Path:
    path.mkdir()
    for name, count in (("train", 5), ("test", 4)):
        np.savez(path / f"{name}.npz", images=np.zeros((count, 28, 28), np.uint8), labels=np.arange(count))
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "folder": make_folder,
    "zip": make_zip,
    "lmdb": make_lmdb,
    "webdataset": make_shards,
    "mnist": make_mnist,
    "fashionmnist": make_mnist,
    "stackedmnist": make_mnist,
}


def refuse(name: str | Path, message: str, **options: Any) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        open_source(str(name), **options)
    assert "\n" not in str(refusal.value)


def kind_of(source: Source) -> str:
    return source.description.partition(":")[0]


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb", "webdataset"])
def test_kind_is_recognised_from_what_lies_there(tmp_path: Path, kind: str) -> None:
    source = open_source(str(MAKERS[kind](tmp_path / "set")))
    assert kind_of(source) == kind
    assert len(source.items) == 5
    assert source.read(source.items[3]) == picture(3)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_kind_may_be_named_and_the_first_images_kept(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "set")
    source = open_source(f"{kind}:{path}")
    assert (kind_of(source), len(source.items)) == (kind, 5)
    few = open_source(f"{kind}:{path}", max_images=2)
    assert few.items == source.items[:2]
    assert fingerprint(few) != fingerprint(source)
    assert len(open_source(f"{kind}:{path}", max_images=9).items) == (9 if kind == "stackedmnist" else 5)
    refuse(f"{kind}:{path}", "max_images is 0: allowed is 1 or more", max_images=0)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_copy_in_another_process_needs_no_items_and_prepares_the_same(tmp_path: Path, kind: str) -> None:
    source = open_source(f"{kind}:{MAKERS[kind](tmp_path / 'set')}")
    form = PreparedForm(size=16, channels=3, upscale=False)
    wanted = prepare_items(source, list(source.items), form)
    assert all(prepared.error is None for prepared in wanted)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.items == ()
    assert prepare_items(copy, list(source.items), form) == wanted


def test_digits_have_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert kind_of(open_source("digits")) == "digits"
    assert [item.name for item in open_source("digits", max_images=2).items] == ["00000", "00001"]
    assert kind_of(open_source("./digits")) == "folder"
    refuse("digits:digits", "digits come with scikit-learn and have no path; give just: digits")


def test_path_with_a_colon_is_a_path_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "zip:photos")
    make_folder(tmp_path / "a:b")
    monkeypatch.chdir(tmp_path)
    assert open_source("zip:photos").description == "folder:zip:photos"
    assert open_source(str(tmp_path / "a:b")).description == "folder:a:b"
    assert open_source("folder:a:b").description == "folder:a:b"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("photos.zip", LFS, "is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned"),
        ("cifar-10-python.tar.gz", LFS, "is a Git LFS pointer"),
        ("data.mdb", LFS, "is a Git LFS pointer"),
        (
            "photos.zip",
            b"\n<!DOCTYPE html><html>",
            "is an HTML page, as a failed download leaves it; download it again",
        ),
        ("photos.tar", b"<html><head>", "is an HTML page"),
        ("photo.avif", b"\0\0\0\x1cftypavif", "is AVIF, which is not read; convert it to PNG or JPEG"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "is HEIC, which is not read; convert it to PNG or JPEG"),
        (
            "cifar-100-python.tar.gz",
            b"",
            "is CIFAR-100, which is not read; write its images to a folder for each class",
        ),
        ("unpacked.tar", b"cifar-100-python/", "is CIFAR-100"),
        ("photos.zip.001", b"PK", r"is a part of a download; .* join all its parts with cat PARTS > photos\.zip"),
        ("photos.tar.part", b"", r"is a part of a download; finish the download"),
        ("photos.tar.aa", b"", r"cat PARTS > photos\.tar, and give that file"),
        ("photos.zip.crdownload", b"", "is a part of a download; finish the download"),
        ("photos.z01", b"PK", r"is a part of a split zip; join them with zip -s 0 photos\.zip --out whole\.zip"),
    ],
)
def test_file_that_is_something_else_is_named_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, told)


def test_folder_that_is_something_else_is_named_with_what_to_do(tmp_path: Path) -> None:
    for name in ("bedroom_lmdb", "church_lmdb"):
        (tmp_path / "lsun" / name).mkdir(parents=True)
        make_lmdb(tmp_path / "lsun" / name)
    refuse(tmp_path / "lsun", rf"holds 2 LMDBs; give one of them alone as the source: {tmp_path}/lsun/bedroom_lmdb")
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("meta", "train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"\x80")
    refuse(
        tmp_path / "cifar-100-python", "is CIFAR-100, which is not read; write its images to a folder for each class"
    )


def test_missing_and_unknown_sources_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    refuse(tmp_path / "gone", f"gone: no such file or folder; {ALLOWED}")
    refuse(tmp_path / "go:ne", f"go:ne: no such file or folder; {ALLOWED}")
    refuse(f"lmdb:{tmp_path}/gone", f"no such file or folder '{tmp_path}/gone'; {ALLOWED}")
    refuse("lmdb:", f"no such file or folder ''; {ALLOWED}")
    refuse("http://host/photos", "a web server does not say which files a folder has; give the URL of an archive")
    refuse("s3:photos", f"unknown kind 's3'; {ALLOWED}")
    refuse(f"cifar100:{tmp_path}", f"unknown kind 'cifar100'; {ALLOWED}")
    refuse("x" * 5000, "no such file or folder")
    (tmp_path / "x.rar").write_bytes(b"")
    refuse(tmp_path / "x.rar", rf"unknown kind of file \.rar; {ALLOWED}")
    refuse(f"folder:{tmp_path}", r"no images in it \(1 other files\); known suffixes: \.bmp")


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb", "webdataset", "digits"])
def test_split_is_refused_for_a_kind_without_splits(tmp_path: Path, kind: str) -> None:
    name = "digits" if kind == "digits" else str(MAKERS[kind](tmp_path / "set"))
    message = rf"split test is given, but {kind} has no splits; leave it out \(kinds with splits: cifar10, mnist, "
    refuse(name, message, split="test")


def test_split_chooses_among_the_files_of_mnist(tmp_path: Path) -> None:
    path = make_mnist(tmp_path / "set")
    for kind in ("mnist", "fashionmnist", "stackedmnist"):
        assert len(open_source(f"{kind}:{path}", split="test").items) == 4
        assert open_source(f"{kind}:{path}", split="train").description == f"{kind}:train"


def test_seed_decides_on_the_triplets_of_stacked_mnist_alone(tmp_path: Path) -> None:
    path = make_mnist(tmp_path / "set")
    for kind, same in (("mnist", True), ("stackedmnist", False)):
        prints = {fingerprint(open_source(f"{kind}:{path}", seed=seed)) for seed in range(3)}
        assert (len(prints) == 1) == same


def test_mnist_form_without_a_kind_is_refused_since_fashion_mnist_has_the_same_files(tmp_path: Path) -> None:
    npz = make_mnist(tmp_path / "npz")
    idx = tmp_path / "idx"
    idx.mkdir()
    (idx / "t10k-images.idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    for path in (npz, idx, npz / "train.npz"):
        refuse(path, rf"say which one this is, or what to make of it: mnist:{path}, fashionmnist:{path} or stacked")


def test_incomplete_cifar10_is_recognised_and_its_missing_files_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"")
    for path in (folder, tmp_path):
        refuse(path, r"cifar-10-batches-py: batches\.meta missing from CIFAR-10; get cifar-10-python\.tar\.gz from")


def test_tar_files_next_to_folders_or_images_need_a_kind(tmp_path: Path) -> None:
    path = make_shards(tmp_path / "set")
    make_folder(path / "cat")
    refuse(path, rf"holds tar files next to folders or images; say what to read: webdataset:{path} or folder:{path}")
    assert len(open_source(f"webdataset:{path}").items) == 5
    assert len(open_source(f"folder:{path}").items) == 5


def test_compressed_shards_are_recognised_and_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(bytes(10240)))
    for path in (tmp_path, tmp_path / "0.tar.gz"):
        refuse(path, r"compressed tar files, such as 0\.tar\.gz, .*; unpack them")


def prepare_unprivileged(source: Path, out: Path) -> tuple[int, str]:
    """The command without root's right to read everything; its exit code and stderr."""
    rights = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "data.prepare", str(source), "--out", str(out), "--size", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_what_may_not_be_read_or_written_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "set" / "cat")
    make_folder(tmp_path / "set" / "dog")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"")
    (tmp_path / "set" / "dog").chmod(0)
    (tmp_path / "a.zip").chmod(0)
    told = {path: prepare_unprivileged(tmp_path / path, tmp_path / "out") for path in ("set", "set/dog", "a.zip")}
    (tmp_path / "set" / "dog").chmod(0o755)
    why = "Permission denied; change its mode or its owner\n"
    assert told == {
        "set": (2, f"data.prepare: source {tmp_path}/set: cannot read {tmp_path}/set/dog: {why}"),
        "set/dog": (2, f"data.prepare: source {tmp_path}/set/dog: cannot be read: {why}"),
        "a.zip": (2, f"data.prepare: source {tmp_path}/a.zip: cannot be read: {why}"),
    }
    (tmp_path / "closed").mkdir(mode=0o555)
    assert prepare_unprivileged(tmp_path / "set", tmp_path / "closed" / "out") == (
        1,
        f"data.prepare: {tmp_path}/closed/.out.unfinished: Permission denied; nothing is left behind\n",
    )
    assert not (tmp_path / "out").exists()


def test_fingerprint_follows_names_sizes_and_labels_but_not_the_place(tmp_path: Path) -> None:
    def make(root: Path, *names: str) -> Path:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
        return root

    one = make(tmp_path / "one" / "set", "a/1.png", "b/2.png")
    two = make(tmp_path / "two" / "set", "a/1.png", "b/2.png")
    base = fingerprint(open_source(str(one)))
    assert fingerprint(open_source(str(two))) == base
    make(two, "b/3.png")
    assert fingerprint(open_source(str(two))) != base
    (one / "a/1.png").write_bytes(b"longer than before")
    assert fingerprint(open_source(str(one))) != base


def test_the_images_that_are_skipped_and_those_that_are_kept_are_all() -> None:
    every = open_source("digits").items
    first, rest = open_source("digits", max_images=5).items, open_source("digits", skip_images=5).items
    assert (*first, *rest) == every
    assert open_source("digits", skip_images=2, max_images=3).items == every[2:5]
    drawn, later = open_source("gaussians25", max_images=9), open_source("gaussians25", skip_images=4, max_images=5)
    assert later.items == drawn.items[4:]
    with pytest.raises(SourceError, match="--skip-images is 1797, but there are 1797 images"):
        open_source("digits", skip_images=1797)
