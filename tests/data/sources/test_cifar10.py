"""CIFAR-10 in the files that its authors publish, which a pickler of Python 2 wrote."""

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data.sources.cifar10 import cifar10_source
from data.sources.find import open_source
from data.sources.source import FormDefaults, SourceError, fingerprint

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


PythonPickler: Any = vars(pickle)["_Pickler"]
"""The pickler in Python, which can be altered."""


class Python2Pickler(PythonPickler):
    """Writes strings and numpy's names as Python 2 with numpy 1 did."""

    dispatch: ClassVar[dict[type, Any]] = dict(PythonPickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = save_string
    dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def planes(batch: int) -> npt.NDArray[np.uint8]:
    """Red tells the image, green the batch, blue the place in the image, as [10000, 3072]."""
    pixels = np.empty((10_000, 3, 1024), dtype=np.uint8)
    pixels[:, 0] = np.arange(10_000)[:, None] % 251
    pixels[:, 1] = batch
    pixels[:, 2] = np.arange(1024) % 253
    return pixels.reshape(10_000, 3072)


def labels(batch: int) -> list[int]:
    return [(number * 7 + batch) % 10 for number in range(10_000)]


def batch_of(batch: int) -> dict[str, Any]:
    return {
        "data": planes(batch),
        "labels": labels(batch),
        "batch_label": f"training batch {batch} of 5",
        "filenames": [f"camion_s_{number:06d}.png" for number in range(10_000)],
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    meta = {"num_cases_per_batch": 10_000, "label_names": NAMES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    for number, name in enumerate(BATCHES):
        (folder / name).write_bytes(python2_pickle(batch_of(number + 1)))
    (folder / "readme.html").write_bytes(b"<meta HTTP-EQUIV='REFRESH'>")
    yield folder
    # It is large, and pytest keeps what the last runs made.
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def archive(unpacked: Path) -> Path:
    file = unpacked.parent / "cifar-10-python.tar.gz"
    order = ["batches.meta", "data_batch_4", "readme.html", "test_batch", *BATCHES[:3], "data_batch_5"]
    with (
        gzip.open(file, "wb", compresslevel=1) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        tar.add(unpacked, arcname=unpacked.name, recursive=False)
        for name in order:
            tar.add(unpacked / name, arcname=f"{unpacked.name}/{name}")
    return file


@pytest.fixture
def own_copy(unpacked: Path, tmp_path: Path) -> Iterator[Path]:
    """Links to the files, which a test may replace one by one."""
    folder = tmp_path / unpacked.name
    folder.mkdir()
    for file in unpacked.iterdir():
        (folder / file.name).symlink_to(file)
    yield folder
    shutil.rmtree(folder)


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(content)


def image(content: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


def expected(batch: int, number: int) -> npt.NDArray[np.uint8]:
    return planes(batch)[number].reshape(3, 32, 32).transpose(1, 2, 0)


def test_fixture_is_what_python_2_wrote(unpacked: Path) -> None:
    content = (unpacked / "data_batch_1").read_bytes()
    assert content.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    # Sizes of the authors' files: 31,035,704 bytes, but for the length of the names in them.
    assert 30_720_000 < len(content) < 31_100_000
    assert pickle.loads(content, encoding="bytes")[b"labels"] == labels(1)


def test_train_is_50000_images_in_the_order_of_the_batches(unpacked: Path) -> None:
    source = cifar10_source(unpacked, split="train")
    assert len(source.items) == 50_000
    assert [item.label for item in source.items] == [label for batch in range(1, 6) for label in labels(batch)]
    assert source.class_names == tuple(NAMES)
    assert source.defaults == FormDefaults(32, 3, False)
    assert source.description == "cifar10:train"
    for number in (0, 9_999, 10_000, 31_234, 49_999):
        found = image(source.read(source.items[number]))
        assert (found == expected(number // 10_000 + 1, number % 10_000)).all()


def test_archive_gives_the_same_as_its_folder(unpacked: Path, archive: Path) -> None:
    packed, loose = cifar10_source(archive, split="test"), cifar10_source(unpacked, split="test")
    assert len(packed.items) == 10_000
    assert packed.description == "cifar10:test"
    assert fingerprint(packed) == fingerprint(loose)
    assert (image(packed.read(packed.items[4321])) == expected(6, 4321)).all()
    assert np.array_equal(packed.pixels, loose.pixels)


@pytest.mark.slow
def test_whole_training_set_is_read_from_the_archive(archive: Path) -> None:
    source = open_source(str(archive))
    assert len(source.items) == 50_000
    assert (image(source.read(source.items[42_000])) == expected(5, 2_000)).all()


def test_found_in_the_folder_above_and_as_archive_of_another_name(
    unpacked: Path, archive: Path, tmp_path: Path
) -> None:
    assert open_source(str(unpacked.parent), split="test", max_images=3).description == "cifar10:test"
    (tmp_path / archive.name).symlink_to(archive)
    (tmp_path / "c10.tgz").symlink_to(archive)
    for path in (tmp_path, tmp_path / "c10.tgz"):
        source = open_source(str(path), split="test", max_images=3)
        assert [item.label for item in source.items] == labels(6)[:3]


def test_pickled_source_is_small_and_loads_its_pixels_again(unpacked: Path) -> None:
    source = cifar10_source(unpacked, split="test")
    wanted = source.read(source.items[3])
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(source.items[3]) == wanted


def test_pickle_of_python_3_under_protocol_2_is_read_too(own_copy: Path) -> None:
    batch = {key.encode(): value for key, value in batch_of(6).items()}
    replace(own_copy, "test_batch", pickle.dumps(batch, protocol=2))
    source = cifar10_source(own_copy, split="test")
    assert (image(source.read(source.items[77])) == expected(6, 77)).all()


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("name", ["batches.meta", "test_batch"])
@pytest.mark.parametrize("function", [os.system, eval, np.load], ids=lambda function: function.__name__)
def test_pickle_that_names_a_function_is_refused_and_nothing_runs(
    own_copy: Path, tmp_path: Path, name: str, function: Callable[..., object]
) -> None:
    mark = tmp_path / "ran"
    argument = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    replace(own_copy, name, pickle.dumps({"label_names": Evil(function, argument)}, protocol=2))
    with pytest.raises(SourceError, match=rf"{name}: cannot .*it asks for \S+, which is not allowed and was not run"):
        cifar10_source(own_copy, split="test")
    assert not mark.exists()


def test_codec_other_than_that_of_bytes_is_refused(own_copy: Path) -> None:
    replace(own_copy, "test_batch", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(SourceError, match="it asks for encoding 'rot13', allowed is latin1"):
        cifar10_source(own_copy, split="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": labels(6)[:-1]}, "holds 9999 labels, expected are 10000"),
        ({"labels": [10] * 10_000}, "holds no labels of 0 to 9"),
        ({"labels": None}, "holds no labels of 0 to 9"),
        ({"data": planes(6)[:-1]}, r"its pixels are no complete uint8 array of shape \[10000, 3072\]"),
        ({"data": np.zeros((10_000, 1536), dtype=">u2")}, "its pixels are no complete uint8 array"),
        ({"data": [1, 2]}, "its pixels are no complete uint8 array"),
    ],
)
def test_batch_of_another_form_is_named(own_copy: Path, change: dict[str, Any], message: str) -> None:
    content = python2_pickle({"data": np.zeros((1, 1), np.uint8), "labels": labels(6)} | change)
    if "labels" in change:
        content = python2_pickle({"data": planes(6)} | change)
    replace(own_copy, "test_batch", content)
    with pytest.raises(SourceError, match=rf"test_batch: .*{message}.*; get cifar-10-python\.tar\.gz from"):
        cifar10_source(own_copy, split="test")


def test_damaged_and_missing_files_are_named(own_copy: Path, unpacked: Path) -> None:
    replace(own_copy, "test_batch", (unpacked / "test_batch").read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"test_batch: cannot be read as a CIFAR-10 file \(it is cut off"):
        cifar10_source(own_copy, split="test")
    replace(own_copy, "test_batch", python2_pickle([1]))
    with pytest.raises(SourceError, match="test_batch: holds no dictionary"):
        cifar10_source(own_copy, split="test")
    (own_copy / "data_batch_3").unlink()
    (own_copy / "data_batch_5").unlink()
    with pytest.raises(SourceError, match="data_batch_3, data_batch_5 missing"):
        cifar10_source(own_copy, split="train")
    replace(own_copy, "batches.meta", python2_pickle({"label_names": NAMES[:9]}))
    with pytest.raises(SourceError, match=r"batches\.meta does not name ten classes"):
        cifar10_source(own_copy, split="test")
    (own_copy / "batches.meta").unlink()
    with pytest.raises(SourceError, match=r"batches\.meta missing"):
        cifar10_source(own_copy, split="test")


def test_other_folders_and_files_are_no_cifar10(tmp_path: Path) -> None:
    file = tmp_path / "cifar-10-binary.tar.gz"
    file.write_bytes(b"no gzip")
    with pytest.raises(SourceError, match=r"no CIFAR-10 there; expected is cifar-10-python\.tar\.gz or the folder"):
        cifar10_source(tmp_path, split="train")
    with pytest.raises(SourceError, match=r"binary\.tar\.gz: cannot be read \("):
        cifar10_source(file, split="train")
    write_archive(file, [member("../cifar-10-batches-bin/data_batch_1.bin", 100)])
    with pytest.raises(SourceError, match=r"binary\.tar\.gz: .*batches\.meta missing"):
        cifar10_source(file, split="train")


def test_truncated_archive_is_named(archive: Path, tmp_path: Path) -> None:
    file = tmp_path / "cifar-10-python.tar.gz"
    file.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"cifar-10-python\.tar\.gz: cannot be read \("):
        cifar10_source(file, split="train")


def write_archive(file: Path, members: list[tarfile.TarInfo]) -> Path:
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for member in members:
            stream.write(member.tobuf())
            for _ in range(-(-member.size // 2**20)):
                stream.write(bytes(2**20))
    return file


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    info.size, info.type = size, kind
    return info


def test_archive_that_unpacks_to_more_than_cifar10_is_refused(tmp_path: Path) -> None:
    one = write_archive(tmp_path / "one.tar.gz", [member("batches.meta", 50 * 2**20)])
    with pytest.raises(SourceError, match=r"batches\.meta: has 52428800 bytes, CIFAR-10's files at most 41943040"):
        cifar10_source(one, split="train")
    many = write_archive(tmp_path / "many.tar.gz", [member(f"junk_{number}", 30 * 2**20) for number in range(7)])
    with pytest.raises(SourceError, match="unpacks to more than 209715200 bytes"):
        cifar10_source(many, split="train")
    # An extended header, which tarfile reads into memory.
    header = write_archive(tmp_path / "header.tar.gz", [member("", 210 * 2**20, tarfile.XHDTYPE)])
    with pytest.raises(SourceError, match="unpacks to more than 209715200 bytes"):
        cifar10_source(header, split="train")
