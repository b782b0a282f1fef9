"""Encoded image -> uint8 pixels of the prepared size; anything else in a shard is an error that names it."""

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data.reader import EncodedSample
from data.shards import DataError

_MODES = {1: "L", 3: "RGB"}


def decode_into(out: npt.NDArray[np.uint8], sample: EncodedSample) -> None:
    """Decode a sample.

    Args:
        out: uint8 [C, H, W], overwritten; its shape is what the image must have.
        sample: JPEG or PNG bytes.

    Raises:
        DataError: damaged image, or one of another size or number of channels.
    """
    try:
        pixels = _decode_jpeg(sample, out.shape) if sample.extension == "jpg" else _decode_other(sample, out.shape)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{_where(sample)}: the image is damaged ({error}); prepare the data set again") from None
    out[...] = pixels.transpose(2, 0, 1)


def _decode_jpeg(sample: EncodedSample, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(sample.content)
    _check(sample, (1 if colorspace.lower() == "gray" else 3, int(height), int(width)), shape)
    return simplejpeg.decode_jpeg(sample.content, colorspace="GRAY" if shape[0] == 1 else "RGB")


def _decode_other(sample: EncodedSample, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(sample.content), formats=["PNG"]) as image:
        _check(sample, (len(image.getbands()), image.height, image.width), shape)
        if image.mode != _MODES[shape[0]]:
            raise DataError(f"{_where(sample)}: PNG mode {image.mode}, expected {_MODES[shape[0]]}")
        return np.asarray(image).reshape(shape[1], shape[2], shape[0])


def _check(sample: EncodedSample, found: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise DataError(
            f"{_where(sample)}: the image is {found[2]}x{found[1]} with {found[0]} channels, the index says "
            f"{expected[2]}x{expected[1]} with {expected[0]}; prepare the data set again"
        )


def _where(sample: EncodedSample) -> str:
    return f"shard {sample.shard}, key {sample.key}"
