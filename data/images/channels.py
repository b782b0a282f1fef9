"""Images of 1 to 8 channels, in image files or .npy arrays, as one plane of 8 bits for each channel."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data.images.decode import BadImageError, ImageFile
from data.images.shown import MAX_CHANNELS, PICTURE_CHANNELS
from data.images.tiff import STARTS as TIFF_STARTS
from data.images.tiff import read_channels

_NPY = b"\x93NUMPY"


def read_planes(content: bytes, num_channels: int, *, max_pixels: int, keep_colours: bool = False) -> list[Image.Image]:
    """The channels of an image, each of mode L. Damaged files may raise any exception.

    Args:
        content: an image file, or an array [H, W] or [H, W, C] of uint8 or uint16 in a .npy file. A TIFF may have any
            number of channels, other image files have up to four, alpha among them. Of 16 bits the upper 8 are kept.
        num_channels: 1 and 3 take image files of any colours as grey and RGB; with others, the file must have as many.
        max_pixels: of the image.
        keep_colours: ignore a colour profile instead of converting to sRGB.

    Raises:
        BadImageError: it cannot be used.
    """
    C = num_channels
    if content.startswith(_NPY):
        array = _array(content, max_pixels, C)
    elif content.startswith(TIFF_STARTS) and (C not in PICTURE_CHANNELS or ImageFile(content).has_wide_planes):
        array = read_channels(content, max_pixels=max_pixels)
    elif C in PICTURE_CHANNELS:
        return bands(decode(ImageFile(content), C, max_pixels=max_pixels, keep_colours=keep_colours), C)
    else:
        parts = decode(ImageFile(content), None, max_pixels=max_pixels).split()
        if len(parts) != C:
            raise BadImageError(f"has {len(parts)} channels, expected are {C}; TIFF and .npy files can hold them")
        return list(parts)
    if array.shape[2] != C:
        raise BadImageError(f"has {array.shape[2]} channels, expected are {C}")
    return [Image.fromarray(np.ascontiguousarray(array[..., c])) for c in range(C)]


def decode_array(content: bytes, *, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """The pixels [H, W, C] of what no image file of grey or RGB holds: a .npy file, or a TIFF that PIL does not know.

    Args:
        content: of the file. Damaged ones may raise any exception.
        max_pixels: of the image.

    Returns:
        None for any other file, which `ImageFile` reads.

    Raises:
        BadImageError: it cannot be used.
    """
    if content.startswith(_NPY):
        return _array(content, max_pixels)
    if content.startswith(TIFF_STARTS):
        try:
            is_known = not ImageFile(content).has_wide_planes
        except UnidentifiedImageError:
            is_known = False
        return None if is_known else read_channels(content, max_pixels=max_pixels)
    return None


def decode(file: ImageFile, num_channels: int | None, *, max_pixels: int, keep_colours: bool = False) -> Image.Image:
    """An image file with 1 or 3 channels, of mode L or RGB; None: pixels and alpha as they are stored."""
    width, height = file.size
    if width * height > max_pixels:
        raise BadImageError(f"has {width}x{height} pixels, more than {max_pixels}")
    if num_channels is None:
        return file.decode(keep_alpha=True)
    return file.decode(keep_colours=keep_colours).convert("L" if num_channels == 1 else "RGB")


def bands(image: Image.Image, num_channels: int) -> list[Image.Image]:
    """The planes of an image as grey or RGB, 1 or 3."""
    return list(image.convert("L" if num_channels == 1 else "RGB").split())


def _array(content: bytes, max_pixels: int, num_channels: int | None = None) -> npt.NDArray[np.uint8]:
    """The array [H, W, C] of a .npy file. Its header is checked first: it may state any size.

    Args:
        content: of the file.
        max_pixels: of the image.
        num_channels: that it must have; None: up to `MAX_CHANNELS`.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    H, W, C = (*shape, 1) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
    if not 1 <= C <= MAX_CHANNELS or (num_channels or C) != C or H * W == 0:
        wanted = num_channels or f"1 to {MAX_CHANNELS}"
        raise BadImageError(f"has the shape {list(shape)}, expected is [height, width, {wanted}]")
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise BadImageError(f"has numbers of type {dtype} without an agreed range; allowed are uint8 and uint16")
    if max_pixels < H * W:
        raise BadImageError(f"has {W}x{H} pixels, more than {max_pixels}")
    if len(content) - stream.tell() != H * W * C * dtype.itemsize:
        raise BadImageError(f"is damaged: it does not have the {H * W * C} numbers that it states")
    array = np.frombuffer(content, dtype, offset=stream.tell()).reshape((H, W, C), order="F" if is_fortran else "C")
    return array if dtype.itemsize == 1 else (array >> 8).astype(np.uint8)
