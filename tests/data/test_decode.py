"""Decoding: the right pixels in the right layout, and a name for everything else."""

import io

import numpy as np
import pytest
from PIL import Image

from data.decode import decode_into
from data.reader import EncodedSample
from data.shards import DataError


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None) -> EncodedSample:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image if mode is None else image.convert(mode)
    if kind == "jpg":
        image.save(stream, "JPEG", quality=95, subsampling=0)
    else:
        image.save(stream, "PNG")
    return EncodedSample("00007.tar", "k1", kind, stream.getvalue(), None)


def picture(channels: int, size: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size]
    planes = [x * 255 // size, y * 255 // size, (x + y) * 127 // size]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8).squeeze()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_comes_back_exactly_as_channels_height_width(channels: int) -> None:
    pixels = picture(channels)
    out = np.zeros((channels, 64, 64), dtype=np.uint8)
    decode_into(out, encoded(pixels, "png"))
    assert np.array_equal(out, pixels.reshape(64, 64, channels).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_comes_back_as_pil_decodes_it(channels: int) -> None:
    sample = encoded(picture(channels), "jpg")
    out = np.zeros((channels, 64, 64), dtype=np.uint8)
    decode_into(out, sample)
    reference = np.asarray(Image.open(io.BytesIO(sample.content))).reshape(64, 64, channels).transpose(2, 0, 1)
    # Both are libjpeg-turbo, of releases that may differ in rounding.
    assert np.abs(out.astype(int) - reference).max() <= 1


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_wrong_size_or_channels_names_shard_and_key(kind: str) -> None:
    with pytest.raises(
        DataError, match=r"shard 00007\.tar, key k1: the image is 64x64 with 3 channels, .* 32x32 with 3"
    ):
        decode_into(np.zeros((3, 32, 32), dtype=np.uint8), encoded(picture(3), kind))
    with pytest.raises(DataError, match="64x64 with 1 channels, the index says 64x64 with 3"):
        decode_into(np.zeros((3, 64, 64), dtype=np.uint8), encoded(picture(1), kind))
    with pytest.raises(DataError, match="64x64 with 3 channels, the index says 64x64 with 1"):
        decode_into(np.zeros((1, 64, 64), dtype=np.uint8), encoded(picture(3), kind))


def test_palette_image_is_refused_rather_than_read_as_grey() -> None:
    with pytest.raises(DataError, match="key k1: PNG mode P, expected L"):
        decode_into(np.zeros((1, 64, 64), dtype=np.uint8), encoded(picture(1), "png", mode="P"))


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_damaged_image_names_shard_and_key(kind: str) -> None:
    whole = encoded(picture(3), kind)
    out = np.zeros((3, 64, 64), dtype=np.uint8)
    for content in (whole.content[: len(whole.content) // 2], b"", b"no image at all"):
        with pytest.raises(DataError, match=r"shard 00007\.tar, key k1: the image is damaged"):
            decode_into(out, whole._replace(content=content))
