"""Writes and reads images: sample grids, folders of PNGs and .npz files of uint8 images.

Files appear complete or not at all: they are written under a temporary name in the same folder and then renamed.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from data.images.shown import MAX_CHANNELS, PICTURE_CHANNELS, pictures_of, tiles_of
from data.images.tiff import write_channels
from data.shards.grid import lay_out
from data.storage.errors import UserError
from data.storage.files import check_writable, replaced
from models.shapes import Uint8Image
from trainer.sample.scatter import scatter
from trainer.sample.video import check_video, save_video

GRID_WIDTH_PIXELS = 512
"""Grids of small images are enlarged to at least this width, and to less than twice this width."""
ANIMATION_WIDTH_PIXELS = 256
"""Frames are enlarged to at least this width."""
ANIMATIONS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "lossless": True},
    ".png": {"format": "PNG"},
    ".gif": {"format": "GIF"},
}
"""Options of Pillow by the extension of a name."""
VIDEO = ".mp4"
FORMS = "a name with .npz (all images in one file), .png (one grid) or no extension (a folder of one file each)"
_POINT = (2, 1, 1)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of image files that are looked for in a folder."""


def image_files(option: str, given: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that are given, and those in the folders that are given.

    Args:
        option: that they were given with, for a message.
        given: files and folders.
        suffixes: of the files that are taken from folders, in lower case.

    Raises:
        UserError: one of them does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in given:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not found:
                raise UserError(f"the folder {path} holds no image: known are {', '.join(suffixes)}")
        elif not path.exists():
            raise UserError(f"{option} is {path}: there is no such file or folder")
        files += found
    return files


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Map [-1, 1] to 0..255 as round((x + 1) * 127.5), rounding halves to even; clamps, and maps NaN to 0.

    The inverse is u / 127.5 - 1: a uint8 image survives the round trip unchanged.
    """
    levels = (images.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return levels.nan_to_num(nan=0.0).round().to(torch.uint8)


def to_pictures(images: Uint8Image) -> Uint8Image:
    """Images of any number of channels as `pictures_of` shows them, on the CPU: uint8 [N, 1 or 3, H, W or C W]."""
    pictures = pictures_of(images.cpu().permute(0, 2, 3, 1).numpy())
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def make_grid(
    images: Uint8Image, class_names: Sequence[str] = (), columns: int | None = None
) -> UInt8[Tensor, "c grid_h grid_w"]:
    """Lay out pictures of N images with 2 grey pixels between them; enlarge small ones by a whole factor.

    Args:
        images: uint8 [N, C, H, W], N > 0.
        class_names: image i is of class i % K: each class becomes a row with its name to the left, and N is a multiple
            of K. Empty: the images come in reading order, in floor(sqrt(N)) rows
            if they are as wide as high.
        columns: of images in reading order; None: as above.
    """
    _check_images(images)
    tiles = tiles_of(images.shape[1])
    rows = len(class_names) or min(len(images), math.isqrt(len(images) * tiles))
    columns = columns or -(-len(images) // rows)
    if class_names:
        images = images.unflatten(0, (columns, len(class_names))).transpose(0, 1).flatten(0, 1)
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()
    width = GRID_WIDTH_PIXELS * min(tiles, columns)  # a channel is as large as an image otherwise
    grid = lay_out(pixels, columns=columns, min_width=width, row_names=class_names)
    return torch.from_numpy(grid).permute(2, 0, 1)


def save_grid(path: Path, images: Uint8Image, class_names: Sequence[str] = (), columns: int | None = None) -> None:
    """Write all images as one grid PNG, see `make_grid`, or 2-D points as one scatter plot."""
    points = images.shape[1:] == _POINT
    save_picture(path, scatter(images) if points else make_grid(images, class_names, columns))


def save_picture(path: Path, picture: UInt8[Tensor, "c h w"]) -> None:
    """Write one picture as PNG."""
    with _appearing(path) as unfinished:
        _save_png(unfinished, picture)


def save_image(path: Path, image: UInt8[Tensor, "c h w"], *, tiff: bool = False) -> None:
    """Write one image without loss, in a form that `data.prepare` reads, and with the suffix of that form.

    Args:
        path: of the file, without its suffix.
        image: grey or RGB becomes a PNG, other numbers of channels an array [H, W, C] in a .npy file.
        tiff: or a TIFF of such a number of channels; needs the extra `tiff`.
    """
    form = _form_of_image(len(image), tiff=tiff)
    with _appearing(path.with_name(path.name + form.suffix)) as unfinished:
        form.write(unfinished, image)


def save_npz(path: Path, images: Uint8Image) -> None:
    """Write all images as `images`, uint8 [N, H, W, C], into one .npz, the format that FID programs read."""
    _check_images(images)
    with _appearing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, images=images.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def save_folder(path: Path, images: Uint8Image) -> None:
    """Write each image as `save_image` does: 000000.png, 000001.png, ...

    Raises:
        UserError: the folder exists and is not empty, so that two sets of samples never mix.
    """
    _check_images(images)
    _check_folder(path)
    with _appearing(path) as unfinished:
        unfinished.mkdir()
        form = _form_of_image(images.shape[1])
        for i, image in enumerate(images.cpu()):
            form.write(unfinished / f"{i:06d}{form.suffix}", image)


def check_destination(path: Path) -> None:
    """Refuse a name that `save_images` would refuse; call it before any work is done.

    Raises:
        ValueError: the extension is unknown, or something exists there that must not be overwritten.
    """
    if path.suffix not in (".npz", ".png", ""):
        raise UserError(f"cannot write images to {path}: unknown extension {path.suffix}; allowed: {FORMS}")
    if path.suffix and path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; allowed: {FORMS}")
    if not path.suffix:
        _check_folder(path)
    check_writable(path)


def save_images(path: Path, images: Uint8Image) -> None:
    """Write images in the format given by the name: .npz, .png (a grid) or a folder.

    Raises:
        ValueError: the extension is unknown, or something exists there that must not be overwritten.
    """
    check_destination(path)
    {".npz": save_npz, ".png": save_grid, "": save_folder}[path.suffix](path, images)


def check_animation(path: Path) -> None:
    """Refuse a name that `save_animation` would refuse; call it before any work is done.

    Raises:
        UserError: the extension is unknown, or a folder has that name.
    """
    if path.suffix not in (*ANIMATIONS, VIDEO):
        allowed = ", ".join((*ANIMATIONS, VIDEO))
        raise UserError(f"cannot write frames to {path}: allowed are names that end in {allowed}")
    if path.suffix == VIDEO:
        check_video()
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path)


def save_animation(path: Path, frames: Uint8Image, fps: int) -> None:
    """Write frames as an animation that repeats for ever, or as a video; small ones are enlarged by a whole factor.

    Args:
        path: ends in .webp, .png (both without loss), .gif (256 colours) or .mp4 (a video, which needs PyAV).
        frames: uint8 [N, C, H, W], N > 0.
        fps: frames per second.

    Raises:
        UserError: as in `check_animation`, or the frames are no images.
    """
    check_animation(path)
    _check_images(frames)
    if frames.shape[1:] == _POINT:
        raise UserError("an animation is made of images, but this model draws points in the plane")
    scale = max(1, -(-ANIMATION_WIDTH_PIXELS // frames.shape[3]))
    if path.suffix == VIDEO and frames.shape[3] % 2:
        scale += scale % 2  # a video has even sides
    pixels = frames.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3).permute(0, 2, 3, 1).cpu().numpy()
    if path.suffix == VIDEO:
        with _appearing(path) as unfinished:
            save_video(unfinished, np.broadcast_to(pixels, (*pixels.shape[:3], 3)), fps)
        return
    pictures = [Pillow.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in pixels]
    options = ANIMATIONS[path.suffix] | {"save_all": True, "append_images": pictures[1:], "loop": 0}
    # GIF counts in hundredths of a second, and programs take 0.01 s for a mistake.
    duration_ms = max(20, round(100 / fps) * 10) if path.suffix == ".gif" else round(1000 / fps)
    with _appearing(path) as unfinished:
        pictures[0].save(unfinished, duration=duration_ms, **options)


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """Images in a file or folder, whose pixels are read batch by batch: they never need to be in memory all at once."""

    num: int
    """Number of images."""
    shape: tuple[int, int, int]
    """(C, H, W) of each image."""
    read: Callable[[int], Iterator[np.ndarray]]
    """All images in order, so many at a time, uint8 [N, H, W, C]. Raises UserError if a file is damaged."""

    def batches(self, size: int) -> Iterator[Uint8Image]:
        """All images in order, `size` at a time, uint8 [N, C, H, W]. Raises UserError if a file is damaged."""
        return (torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in self.read(size))


def open_images(path: Path) -> StoredImages:
    """Look at images in the format of `save_npz` or `save_folder`, but not yet at their pixels.

    Raises:
        UserError: the path does not exist or has another format, or the images differ in size or channels.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"cannot read images from {path}: no such file or folder")
    if path.suffix != ".npz":
        raise UserError(f"cannot read images from {path}: expected a .npz file or a folder of PNGs")
    return _open_npz(path)


def load_images(path: Path) -> Uint8Image:
    """Read images in the format of `save_npz` or `save_folder`, as uint8 [N, C, H, W].

    Raises:
        UserError: as `open_images`, or a file is damaged.
    """
    stored = open_images(path)
    return next(stored.batches(stored.num))


def _open_npz(path: Path) -> StoredImages:
    with _array_of_images(path) as (_, shape, fortran_order, dtype):
        pass
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in PICTURE_CHANNELS or 0 in shape:
        raise UserError(
            f"{path}: images is {dtype} {list(shape)}, expected uint8 [N, H, W, C] with C = 1 or 3 and N > 0"
        )
    num, height, width, channels = shape

    def read(size: int) -> Iterator[np.ndarray]:
        with _array_of_images(path) as (stream, *_):
            # In the order of Fortran the images lie interleaved: there all of them are read at once.
            at_once = num if fortran_order else size
            for first in range(0, num, at_once):
                form = (min(at_once, num - first), height, width, channels)
                content = np.frombuffer(bytearray(stream.read(math.prod(form))), np.uint8)
                array = content.reshape(form, order="F" if fortran_order else "C")
                yield from (array[i : i + size] for i in range(0, len(array), size))

    return StoredImages(num=num, shape=(channels, height, width), read=read)


@contextmanager
def _array_of_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """The data of the array `images` in an .npz as a stream; its shape, whether in the order of Fortran, its type."""
    try:
        with ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "images" not in names:
                raise UserError(f"{path} has no array named images, it has: {', '.join(names) or 'none'}")
            with archive.open("images.npy") as stream:
                is_first = np.lib.format.read_magic(stream) == (1, 0)
                header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
                yield stream, *header(stream)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read images from {path}: {error}") from None


def _open_folder(folder: Path) -> StoredImages:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"the folder {folder} holds no .png file: only PNG is read, since other formats change pixels")
    first = None
    for file in files:
        with _opened(file) as image:
            form = (image.height, image.width, len(image.getbands()))
            if image.mode not in ("L", "RGB"):
                raise UserError(f"{file} has the pixel format {image.mode}, expected L (8-bit grey) or RGB")
        first = first or form
        if form != first:
            raise UserError(
                f"{file} has (height, width, channels) {form}, but {files[0].name} has {first}: "
                "all images must have the same shape"
            )
    assert first is not None
    height, width, channels = first

    def pixels(file: Path) -> np.ndarray:
        with _opened(file) as image:
            return np.array(image).reshape(first)

    def read(size: int) -> Iterator[np.ndarray]:
        for i in range(0, len(files), size):
            yield np.stack([pixels(file) for file in files[i : i + size]])

    return StoredImages(num=len(files), shape=(channels, height, width), read=read)


@contextmanager
def _opened(file: Path) -> Iterator[Pillow.Image]:
    try:
        with Pillow.open(file) as image:
            yield image
    except UserError:
        raise
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _save_png(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    array = image.permute(1, 2, 0).contiguous().numpy()
    Pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path, format="PNG")


def _save_npy(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a name
        np.save(file, image.permute(1, 2, 0).contiguous().numpy())


def _save_tiff(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    write_channels(path, image.contiguous().numpy())


class _Form(NamedTuple):
    """Of the file of one image."""

    suffix: str
    write: Callable[[Path, Tensor], None]


def _form_of_image(num_channels: int, *, tiff: bool = False) -> _Form:
    if num_channels in PICTURE_CHANNELS:
        return _Form(".png", _save_png)
    return _Form(".tif", _save_tiff) if tiff else _Form(".npy", _save_npy)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write images into {path}: it is a file; allowed: {FORMS}")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"cannot write images into {path}: the folder is not empty. Empty it, or choose another one")


def _check_images(images: Tensor) -> None:
    form = images.ndim == 4 and 1 <= images.shape[1] <= MAX_CHANNELS
    if images.dtype != torch.uint8 or not form or len(images) == 0:
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [N, C, H, W] with C = 1 to {MAX_CHANNELS} "
            "and N > 0; to_uint8 converts floats in [-1, 1]"
        )


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; it is renamed to `path` at the end, or removed if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished:
        yield unfinished
