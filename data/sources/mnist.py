"""MNIST, Fashion-MNIST in the same format, and StackedMNIST, made from MNIST.

The files are the authors' (idx, plain or .gz) in a folder, or .npz with `images` and `labels`.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from data.sources.arrays import DIGIT_NAMES, ArraySource, LabelledPixels, Split, array_source
from data.sources.source import FormDefaults, Item, SourceError, pixel_file

_IMAGE_SHAPE = (28, 28)
_MAX_IMAGES = 10**6
"""Fourteen times the authors' number; limits the count in a header."""
_MAX_NPY_HEADER_BYTES = 16 * 2**10
_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_STACKED_PAD = 2
"""Black pixels on each side: 28 -> 32."""
_MAX_TRIPLETS = 10**7
"""They take about 4 GB."""
_STACKED_TAG = 0x737461636B  # "stack": keeps these draws apart from any other use of the same seed


@dataclass(frozen=True, kw_only=True)
class StackedMnistSource(ArraySource):
    """Triplets of grey images as red, green and blue; an item's name lists them: `number-red-green-blue`.

    The arrays hold the single images, uint8 [N, 28, 28, 1].
    """

    def read(self, item: Item) -> bytes:
        """A 32x32 PPM file, with a black border."""
        triplet = [int(number) for number in item.name.split("-")[1:]]
        stacked = np.pad(self.pixels[triplet, :, :, 0], ((0, 0), (_STACKED_PAD,) * 2, (_STACKED_PAD,) * 2))
        return pixel_file(stacked.transpose(1, 2, 0).tobytes(), size=stacked.shape[1], channels=3)


def holds_mnist(path: Path) -> bool:
    """Whether there are files in MNIST's format, which Fashion-MNIST shares."""
    if path.is_file():
        return path.suffix.lower() == ".npz"
    splits: tuple[Split, ...] = ("train", "test")
    return any(_find_npz(path, split) or _find_idx(path, split, "images-idx3") for split in splits)


def mnist_source(path: Path, *, kind: Literal["mnist", "fashionmnist"], split: Split | None) -> ArraySource:
    """MNIST or Fashion-MNIST.

    Args:
        path: a folder of idx files, a folder with train.npz and test.npz, or a single .npz.
        kind: determines the class names.
        split: None: train, or all of a single .npz, which has no splits.

    Raises:
        SourceError: missing or damaged files.
    """
    name, load = _find(path, split)
    class_names = DIGIT_NAMES if kind == "mnist" else _GARMENTS
    return array_source(f"{kind}:{name}", load, class_names=class_names, defaults=FormDefaults(28, 1, False))


def stacked_mnist_source(path: Path, *, split: Split | None, num_triplets: int | None, seed: int) -> StackedMnistSource:
    """StackedMNIST: random triplets of MNIST images with replacement, 1,000 classes.

    Args:
        path: as for `mnist_source`.
        split: as for `mnist_source`.
        num_triplets: None: one per single image; at most 10**7.
        seed: determines the triplets, 0 .. 2**64 - 1; the first ones do not depend on num_triplets.

    Raises:
        SourceError: as for `mnist_source`, or too many triplets.
    """
    if num_triplets is not None and num_triplets > _MAX_TRIPLETS:
        raise SourceError(f"source {path}: {num_triplets} triplets are asked for, allowed are 1 to {_MAX_TRIPLETS}")
    name, load = _find(path, split)
    loaded = load()
    labels = loaded.labels
    triplets = _draw_triplets(num_triplets or len(labels), num_images=len(labels), seed=seed)
    stacked_labels = labels[triplets] @ np.array([100, 10, 1])
    num_bytes = 3 * (_IMAGE_SHAPE[0] + 2 * _STACKED_PAD) ** 2
    items = tuple(
        Item(f"{number:06d}-{red:05d}-{green:05d}-{blue:05d}", num_bytes, label)
        for number, ((red, green, blue), label) in enumerate(
            zip(triplets.tolist(), stacked_labels.tolist(), strict=True)
        )
    )
    return StackedMnistSource(
        description=f"stackedmnist:{name}",
        load=load,
        items=items,
        class_names=tuple(f"{number:03d}" for number in range(1000)),
        state=loaded.digest,
        defaults=FormDefaults(32, 3, False),
    )


def _draw_triplets(length: int, *, num_images: int, seed: int) -> npt.NDArray[np.int64]:
    """Image numbers [length, 3].

    Uses raw 64-bit outputs, which numpy keeps stable; its distributions may change between releases. The remainder
    favours some images by less than 2**-40.
    """
    generator = np.random.Philox(key=np.array([seed, _STACKED_TAG], dtype=np.uint64))
    draws = np.asarray(generator.random_raw(3 * length), dtype=np.uint64)
    return (draws % np.uint64(num_images)).astype(np.int64).reshape(length, 3)


def _find(path: Path, split: Split | None) -> tuple[str, Callable[[], LabelledPixels]]:
    """Name for the description, and a function that loads images and labels."""
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise SourceError(
                f"source {path}: MNIST comes as a folder of its four idx files (.gz or plain), or as .npz with "
                "images and labels; give one of these"
            )
        if split is not None:
            raise SourceError(
                f"source {path}: a single .npz has no splits, but split {split} is given; leave it out, or give a "
                "folder with train.npz and test.npz"
            )
        return path.name, partial(_load_npz, path.resolve())
    wanted: Split = split or "train"
    npz = _find_npz(path, wanted)
    if npz is not None:
        return wanted, partial(_load_npz, npz)
    images, labels = _find_idx(path, wanted, "images-idx3"), _find_idx(path, wanted, "labels-idx1")
    if images is None or labels is None:
        prefix = _IDX_PREFIXES[wanted]
        part = "images-idx3" if images is None else "labels-idx1"
        raise SourceError(
            f"source {path}: no {prefix}-{part}-ubyte(.gz) and no {wanted}.npz in it; "
            "put the authors' files there under their own names"
        )
    return wanted, partial(_load_idx, images, labels)


def _find_npz(folder: Path, split: Split) -> Path | None:
    file = folder / f"{split}.npz"
    return file.resolve() if file.is_file() else None


def _find_idx(folder: Path, split: Split, part: str) -> Path | None:
    # Manual unpacking often leaves a dot in place of the last hyphen.
    for name in (f"{_IDX_PREFIXES[split]}-{part}-ubyte", f"{_IDX_PREFIXES[split]}-{part.replace('-', '.')}-ubyte"):
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file.resolve()
    return None


def _load_idx(images: Path, labels: Path) -> LabelledPixels:
    return _checked(
        images, _read_idx(images, magic=2051, shape=_IMAGE_SHAPE), labels, _read_idx(labels, magic=2049, shape=())
    )


def _read_idx(file: Path, *, magic: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The array of an idx file: big-endian magic number and dimensions, then bytes."""
    where = f"source {file}"
    header_bytes = 4 * (2 + len(shape))
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = np.frombuffer(stream.read(header_bytes).ljust(header_bytes, b"\0"), dtype=">u4").tolist()
            if header[0] != magic or tuple(header[2:]) != shape:
                raise SourceError(
                    f"{where}: its header says {header}, expected is [{', '.join(map(str, (magic, 'N', *shape)))}]; "
                    "it is no file of MNIST, or damaged: get it again"
                )
            count = header[1]
            if not 0 < count <= _MAX_IMAGES:
                raise SourceError(f"{where}: its header says {count} images, allowed are 1 to {_MAX_IMAGES}")
            expected = count * math.prod(shape)
            # One byte more than the header says: detects a longer file, and limits unpacking.
            content = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{where}: cannot be read ({error}); get it again") from None
    if len(content) != expected:
        found = f"only {len(content)}" if len(content) < expected else "more"
        raise SourceError(f"{where}: its header says {expected} bytes, it holds {found}; get it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(count, *shape)


def _load_npz(file: Path) -> LabelledPixels:
    try:
        with zipfile.ZipFile(file) as archive:
            images = _read_npy(file, archive, "images", _IMAGE_SHAPE)
            labels = _read_npy(file, archive, "labels", ())
    except SourceError:
        raise
    # A damaged header is parsed as Python, which raises nearly anything, e.g. MemoryError for deep brackets.
    except Exception as error:
        raise SourceError(f"source {file}: cannot be read ({error}); get it again") from None
    return _checked(file, images, file, labels)


def _read_npy(file: Path, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    where = f"source {file}: {name}"
    if f"{name}.npy" not in archive.namelist():
        raise SourceError(f"{where} is missing; an .npz must hold uint8 images [N, 28, 28] and labels [N]")
    member = archive.getinfo(f"{name}.npy")
    # Before unpacking: the array's header must be right, and agree with the zip directory.
    with archive.open(member) as stream:
        found, dtype = _read_npy_header(stream)
    if not found or found[1:] != shape or dtype.kind not in "iu" or (shape and dtype != np.uint8):
        raise SourceError(f"{where} is {dtype} {list(found)}, expected are uint8 images [N, 28, 28] and labels [N]")
    if not 0 < found[0] <= _MAX_IMAGES:
        raise SourceError(f"{where} holds {found[0]} images, allowed are 1 to {_MAX_IMAGES}")
    expected = math.prod(found) * dtype.itemsize
    if not expected <= member.file_size <= expected + _MAX_NPY_HEADER_BYTES:
        raise SourceError(f"{where} has {member.file_size} bytes, its header says {expected}; get it again")
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _checked(
    images_file: Path, images: npt.NDArray[np.generic], labels_file: Path, labels: npt.NDArray[np.generic]
) -> LabelledPixels:
    if len(images) != len(labels):
        raise SourceError(
            f"source {labels_file}: {len(labels)} labels for {len(images)} images of {images_file.name}; "
            "they belong to different sets"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise SourceError(
            f"source {labels_file}: labels are {labels.min()} to {labels.max()}, allowed are 0 to 9; it is not MNIST"
        )
    return LabelledPixels(images.astype(np.uint8)[..., None], labels.astype(np.int64))
