"""Encoded image -> uint8 pixels of the prepared size; any other content is an error that names the sample."""

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data.shards.offsets import PLANES_EXTENSION
from data.shards.reader import BadSampleError, EncodedSample

_MODES = {1: "L", 2: "LA", 3: "RGB"}
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header (ITU T.81, table B.1)."""
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers without a length field."""


def decode_into(out: npt.NDArray[np.uint8], sample: EncodedSample) -> None:
    """Decode a sample.

    Args:
        out: uint8 [H, W, C], contiguous, overwritten; the image must have its shape.
        sample: JPEG or PNG bytes, or planes in a PNG.

    Raises:
        BadSampleError: damaged image, or another size or number of channels.
    """
    try:
        if sample.extension == "jpg":
            _check(sample, _jpeg_shape(sample.content), out.shape)
            simplejpeg.decode_jpeg(sample.content, colorspace="GRAY" if out.shape[2] == 1 else "RGB", buffer=out)
        elif sample.extension == PLANES_EXTENSION:
            out[...] = _decode_planes(sample, out.shape)
        else:
            out[...] = _decode_png(sample, out.shape)
    except (BadSampleError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # its own message has a memory address
        raise BadSampleError(f"{_where(sample)}: the image is damaged (no PNG); prepare the data set again") from None
    # On damaged input PIL raises nearly anything, e.g. IndexError and struct.error for short chunks.
    except Exception as error:
        raise BadSampleError(f"{_where(sample)}: the image is damaged ({error}); prepare the data set again") from None


def _jpeg_shape(content: bytes) -> tuple[int, int, int]:
    """Height, width and channels from a JPEG's frame header. libjpeg would take a tenth of the decoding time."""
    place = 2
    while content[place : place + 1] == b"\xff" and len(content) > place + 9:
        marker = content[place + 1]
        if marker in _START_OF_FRAME:
            height, width = (int.from_bytes(content[place + at : place + at + 2]) for at in (5, 7))
            return height, width, content[place + 9]
        if marker == 0xFF:  # fill bytes may precede a marker
            place += 1
        elif marker in _ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4])
    raise ValueError("no JPEG frame")


def _decode_png(sample: EncodedSample, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(sample.content), formats=["PNG"]) as image:
        _check(sample, (image.height, image.width, len(image.getbands())), shape)
        if image.mode != (mode := _MODES.get(shape[2])):
            raise BadSampleError(f"{_where(sample)}: PNG mode {image.mode}, expected {mode or PLANES_EXTENSION}")
        return np.asarray(image).reshape(shape)


def _decode_planes(sample: EncodedSample, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    H, W, C = shape
    planes = _decode_png(sample, (C * H, W, 1))
    return planes.reshape(C, H, W).transpose(1, 2, 0)


def _check(sample: EncodedSample, found: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise BadSampleError(
            f"{_where(sample)}: the image is {found[1]}x{found[0]} with {found[2]} channels, the index says "
            f"{expected[1]}x{expected[0]} with {expected[2]}; prepare the data set again"
        )


def _where(sample: EncodedSample) -> str:
    return f"shard {sample.shard}, key {sample.key}"
