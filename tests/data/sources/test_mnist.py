"""MNIST, Fashion-MNIST and StackedMNIST from files in the authors' form."""

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data.sources.mnist import mnist_source, stacked_mnist_source
from data.sources.source import FormDefaults, SourceError, fingerprint
from tests.launch import ROOT

REAL = ROOT.parent / "shared" / "data" / "mnist"
Array = npt.NDArray[np.uint8]


def pixels(count: int, start: int = 0) -> Array:
    """The first pixel tells the number, the others their place."""
    images = np.tile(np.arange(784, dtype=np.uint32) % 256, (count, 1)).astype(np.uint8)
    images[:, 0] = np.arange(start, start + count)
    return images.reshape(count, 28, 28)


def labels(count: int) -> Array:
    return (np.arange(count) * 3 % 10).astype(np.uint8)


def idx(array: Array) -> bytes:
    """The authors' format: two zero bytes, 8 for unsigned bytes, the number of dimensions, the dimensions, the data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, *, compressed: bool = True, dot: str = "-") -> Path:
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 12)):
        for name, array in (("images-idx3", pixels(count, 100)), ("labels-idx1", labels(count))):
            file = folder / f"{prefix}-{name.replace('-', dot)}-ubyte{'.gz' if compressed else ''}"
            file.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    return folder


def write_npz(file: Path, *, images: npt.NDArray[np.generic] | None = None, digits: object = None) -> Path:
    file.parent.mkdir(exist_ok=True)
    arrays = {"images": pixels(20, 100) if images is None else images}
    arrays["labels"] = labels(20) if digits is None else np.asarray(digits)
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file


def image(content: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_idx(folder),
        lambda folder: write_idx(folder, compressed=False),
        lambda folder: write_idx(folder, dot="."),
        lambda folder: write_npz(folder / "train.npz").parent,
    ],
    ids=["gz", "plain", "dot", "npz"],
)
def test_every_form_gives_the_same_images(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = mnist_source(write(tmp_path / "set"), kind="mnist", split=None)
    assert [item.label for item in source.items] == labels(20).tolist()
    assert source.class_names == tuple("0123456789")
    assert source.description == "mnist:train"
    assert source.defaults == FormDefaults(28, 1, False)
    for number in (0, 7, 19):
        assert (image(source.read(source.items[number])) == pixels(20, 100)[number]).all()
    assert fingerprint(source) == fingerprint(
        mnist_source(write_idx(tmp_path / "gz"), kind="mnist", split="train"),
    )


def test_test_split_is_the_files_called_t10k(tmp_path: Path) -> None:
    source = mnist_source(write_idx(tmp_path), kind="mnist", split="test")
    assert (len(source.items), source.description) == (12, "mnist:test")


def test_fashion_mnist_has_the_names_of_its_garments(tmp_path: Path) -> None:
    source = mnist_source(write_idx(tmp_path), kind="fashionmnist", split=None)
    assert source.description == "fashionmnist:train"
    assert source.class_names is not None
    assert (len(source.class_names), source.class_names[0], source.class_names[9]) == (10, "T-shirt/top", "Ankle boot")


def test_single_npz_is_taken_whole_and_has_no_splits(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "digits.npz", digits=labels(20).astype(np.int64))
    source = mnist_source(file, kind="mnist", split=None)
    assert (len(source.items), source.description) == (20, "mnist:digits.npz")
    with pytest.raises(SourceError, match=r"a single \.npz has no splits, but split train is given; leave it out"):
        mnist_source(file, kind="mnist", split="train")


def test_pickled_source_is_small_and_loads_its_pixels_again(tmp_path: Path) -> None:
    source = mnist_source(write_idx(tmp_path), kind="mnist", split=None)
    wanted = source.read(source.items[4])
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(source.items[4]) == wanted


def refuse(folder: Path, message: str, split: Literal["train", "test"] | None = None) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        mnist_source(folder, kind="mnist", split=split)
    assert "\n" not in str(refusal.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    refuse(tmp_path, r"no train-images-idx3-ubyte\(\.gz\) and no train\.npz in it; put the authors' files")
    (write_idx(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    refuse(tmp_path, r"no t10k-labels-idx1-ubyte\(\.gz\) and no test\.npz", "test")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    refuse(file, r"MNIST comes as a folder of its four idx files \(\.gz or plain\), or as \.npz")


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_header_is_checked(tmp_path: Path, compressed: bool) -> None:
    write_idx(tmp_path, compressed=compressed)
    file = next(tmp_path.glob("train-images*"))

    def write(content: bytes) -> None:
        file.write_bytes(gzip.compress(content) if compressed else content)

    good = idx(pixels(20))
    write(b"\0\0\x08\x01" + good[4:])
    refuse(tmp_path, r"train-images\S+: its header says \[2049, 20, 28, 28\], expected is \[2051, N, 28, 28\]")
    write(idx(pixels(20).reshape(20, 14, 56)))
    refuse(tmp_path, r"its header says \[2051, 20, 14, 56\]")
    write(good[:10])
    refuse(tmp_path, r"its header says \[2051, 20, 0, 0\]")
    write(good[:-1])
    refuse(tmp_path, r"train-images\S+: its header says 15680 bytes, it holds only 15679; get it again")
    write(good + b"\0")
    refuse(tmp_path, "its header says 15680 bytes, it holds more")
    write(idx(pixels(0)))
    refuse(tmp_path, "its header says 0 images, allowed are 1 to 1000000")
    write(idx(pixels(19)))
    refuse(
        tmp_path, r"train-labels\S+: 20 labels for 19 images of train-images-idx3-ubyte\S*; they belong to different"
    )


def test_truncated_or_false_gz_is_named(tmp_path: Path) -> None:
    file = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    refuse(tmp_path, r"train-images-idx3-ubyte\.gz: cannot be read \(Compressed file ended")
    file.write_bytes(idx(pixels(20)))
    refuse(tmp_path, r"train-images-idx3-ubyte\.gz: cannot be read \(Not a gzipped file")


def test_idx_that_promises_or_holds_too_much_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    file = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, 2**32 - 1, 28, 28) + bytes(100)))
    refuse(tmp_path, "its header says 4294967295 images, allowed are 1 to 1000000")
    file.write_bytes(gzip.compress(idx(pixels(20)) + bytes(50 * 2**20)))
    refuse(tmp_path, "its header says 15680 bytes, it holds more")


def test_label_of_another_set_is_refused(tmp_path: Path) -> None:
    refuse(write_npz(tmp_path / "a.npz", digits=[10] * 20), "labels are 10 to 10, allowed are 0 to 9; it is not MNIST")
    refuse(write_npz(tmp_path / "b.npz", digits=[-1] * 20), "labels are -1 to -1")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_npz_of_another_form_is_refused(tmp_path: Path) -> None:
    form = r"expected are uint8 images \[N, 28, 28\] and labels \[N\]"
    refuse(write_npz(tmp_path / "a.npz", images=pixels(20).astype(np.float32)), rf"is float32 \[20, 28, 28\], {form}")
    refuse(write_npz(tmp_path / "b.npz", images=np.zeros((20, 32, 32), np.uint8)), rf"is uint8 \[20, 32, 32\], {form}")
    refuse(write_npz(tmp_path / "c.npz", digits=3), rf"labels is int64 \[\], {form}")
    np.savez(tmp_path / "d.npz", images=pixels(20))
    refuse(tmp_path / "d.npz", r"labels is missing; an \.npz must hold uint8 images \[N, 28, 28\] and labels \[N\]")
    (tmp_path / "e.npz").write_bytes(b"no zip")
    refuse(tmp_path / "e.npz", r"e\.npz: cannot be read \(File is not a zip file\)")


def test_pickled_objects_in_an_npz_are_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = write_npz(tmp_path / "a.npz", digits=np.array([Evil(mark)] * 20, dtype=object))
    mark.unlink(missing_ok=True)
    refuse(file, r"labels is object \[20\]")
    assert not mark.exists()


def test_npz_header_that_disagrees_with_the_archive_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (900_000, 28, 28)})
    for name, extra in (("less", b"\0" * 100), ("more", b"\0" * 2**20)):
        header = stream.getvalue() if name == "less" else stream.getvalue().replace(b"900000", b"     1")
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", header + extra)
            archive.writestr("labels.npy", b"")
    refuse(tmp_path / "less.npz", r"images has \d+ bytes, its header says 705600000; get it again")
    refuse(tmp_path / "more.npz", r"images has \d+ bytes, its header says 784; get it again")
    content = stream.getvalue().replace(b"900000", b"9000000")
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        archive.writestr("images.npy", content)
    refuse(tmp_path / "many.npz", "images holds 9000000 images, allowed are 1 to 1000000")


def test_stacked_digits_are_the_three_images_in_red_green_and_blue(tmp_path: Path) -> None:
    source = stacked_mnist_source(write_idx(tmp_path), split=None, num_triplets=50, seed=3)
    assert len(source.items) == 50
    assert source.defaults == FormDefaults(32, 3, False)
    assert source.description == "stackedmnist:train"
    assert source.class_names is not None
    assert (len(source.class_names), source.class_names[7], source.class_names[999]) == (1000, "007", "999")
    singles, digits = pixels(20, 100), labels(20)
    for item in source.items:
        stacked = image(source.read(item))
        assert stacked.shape == (32, 32, 3)
        # The first pixel of each channel tells which image it is.
        triplet = stacked[2, 2] - 100
        wanted = np.zeros((32, 32, 3), dtype=np.uint8)
        wanted[2:30, 2:30] = singles[triplet].transpose(1, 2, 0)
        assert (stacked == wanted).all()
        red, green, blue = digits[triplet].tolist()
        assert item.label == 100 * red + 10 * green + blue


def test_triplets_follow_the_seed_and_the_first_ones_not_their_number(tmp_path: Path) -> None:
    folder = write_idx(tmp_path)
    few = stacked_mnist_source(folder, split=None, num_triplets=5, seed=3)
    many = stacked_mnist_source(folder, split=None, num_triplets=500, seed=3)
    other = stacked_mnist_source(folder, split=None, num_triplets=5, seed=4)
    assert many.items[:5] == few.items
    assert fingerprint(other) != fingerprint(few)
    # Written down once: these never change, since a prepared data set is compared with them.
    assert [item.name for item in few.items[:2]] == ["000000-00003-00014-00010", "000001-00003-00012-00008"]
    drawn = {int(number) for item in many.items for number in item.name.split("-")[1:]}
    assert drawn == set(range(20))
    assert any(len(set(item.name.split("-")[1:])) < 3 for item in many.items)


def test_more_triplets_than_memory_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="10000001 triplets are asked for, allowed are 1 to 10000000"):
        stacked_mnist_source(write_idx(tmp_path), split=None, num_triplets=10**7 + 1, seed=0)


def test_as_many_triplets_as_single_images_by_default(tmp_path: Path) -> None:
    source = stacked_mnist_source(write_idx(tmp_path), split="test", num_triplets=None, seed=0)
    assert (len(source.items), source.description) == (12, "stackedmnist:test")


def test_stacked_source_is_small_to_pickle(tmp_path: Path) -> None:
    source = stacked_mnist_source(write_idx(tmp_path), split=None, num_triplets=2000, seed=0)
    wanted = source.read(source.items[1234])
    pickled = pickle.dumps(source)
    assert len(pickled) < 12_000
    assert pickle.loads(pickled).read(source.items[1234]) == wanted


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real MNIST at {REAL}")
def test_real_mnist_gives_60000_digits_and_triplets_of_all_classes() -> None:
    source = mnist_source(REAL, kind="mnist", split=None)
    assert len(source.items) == 60_000
    with np.load(REAL / "train.npz", allow_pickle=False) as arrays:
        images, digits = arrays["images"], arrays["labels"]
    assert [item.label for item in source.items] == digits.tolist()
    for number in (0, 31_415, 59_999):
        assert (image(source.read(source.items[number])) == images[number]).all()
    stacked = stacked_mnist_source(REAL, split=None, num_triplets=None, seed=0)
    assert len(stacked.items) == 60_000
    assert {item.label for item in stacked.items} == set(range(1000))
    _, red, green, blue = map(int, stacked.items[0].name.split("-"))
    found = image(stacked.read(stacked.items[0]))[2:30, 2:30]
    assert (found == images[[red, green, blue]].transpose(1, 2, 0)).all()


@pytest.mark.parametrize("header", [b"{{{{", b"{[]:1}\n", b"(" * 9000, b"\xff"], ids=["token", "key", "depth", "bytes"])
def test_npz_header_that_is_no_dictionary_is_refused(tmp_path: Path, header: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    with pytest.raises(SourceError, match=r"a\.npz: cannot be read \("):
        mnist_source(tmp_path / "a.npz", kind="mnist", split=None)
