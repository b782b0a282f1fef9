"""Decoding: the right pixels in the right layout, and a name for everything else."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data.shards.decode import decode_into
from data.shards.reader import BadSampleError, EncodedSample


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
def test_png_comes_back_exactly_as_height_width_channels(channels: int) -> None:
    pixels = picture(channels)
    out = np.zeros((64, 64, channels), dtype=np.uint8)
    decode_into(out, encoded(pixels, "png"))
    assert np.array_equal(out, pixels.reshape(64, 64, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_comes_back_as_pil_decodes_it(channels: int) -> None:
    sample = encoded(picture(channels), "jpg")
    out = np.zeros((64, 64, channels), dtype=np.uint8)
    decode_into(out, sample)
    reference = np.asarray(Image.open(io.BytesIO(sample.content))).reshape(64, 64, channels)
    # Both are libjpeg-turbo, of releases that may differ in rounding.
    assert np.abs(out.astype(int) - reference).max() <= 1


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_wrong_size_or_channels_names_shard_and_key(kind: str) -> None:
    with pytest.raises(
        BadSampleError, match=r"shard 00007\.tar, key k1: the image is 64x64 with 3 channels, .* 32x32 with 3"
    ):
        decode_into(np.zeros((32, 32, 3), dtype=np.uint8), encoded(picture(3), kind))
    with pytest.raises(BadSampleError, match="64x64 with 1 channels, the index says 64x64 with 3"):
        decode_into(np.zeros((64, 64, 3), dtype=np.uint8), encoded(picture(1), kind))
    with pytest.raises(BadSampleError, match="64x64 with 3 channels, the index says 64x64 with 1"):
        decode_into(np.zeros((64, 64, 1), dtype=np.uint8), encoded(picture(3), kind))


def test_progressive_jpeg_with_metadata_before_its_frame_comes_back() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a description " * 100
    Image.fromarray(picture(3)).save(stream, "JPEG", progressive=True, exif=exif, quality=95)
    out = np.zeros((64, 64, 3), dtype=np.uint8)
    decode_into(out, EncodedSample("00007.tar", "k1", "jpg", stream.getvalue(), None))
    assert np.abs(out.astype(int) - np.asarray(Image.open(stream))).max() <= 1


@pytest.mark.parametrize("before_frame", [b"\xff" * 3, b"\xff\x01", b"\xff\xd3\xff"])
def test_jpeg_with_fill_bytes_or_markers_without_a_length_before_its_frame_comes_back(before_frame: bytes) -> None:
    sample = encoded(picture(3), "jpg")
    out, plain = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    decode_into(plain, sample)
    place = sample.content.index(b"\xff\xc0")
    content = sample.content[:place] + before_frame + sample.content[place:]
    decode_into(out, sample._replace(content=content))
    assert np.array_equal(out, plain)


@pytest.mark.parametrize("segment", [b"\xff\xe1\0\0", b"\xff\xe1\0\1", b"\xff" * 4000, b"\xff\xe1\xff\xff"])
def test_jpeg_segment_without_an_end_is_damage(segment: bytes) -> None:
    sample = encoded(picture(3), "jpg")
    with pytest.raises(BadSampleError, match="the image is damaged"):
        decode_into(np.zeros((64, 64, 3), dtype=np.uint8), sample._replace(content=b"\xff\xd8" + segment))


def test_colour_profile_that_is_cut_off_behind_the_pixels_is_damage() -> None:
    # PIL raises an IndexError there.
    whole = encoded(picture(3), "png").content
    end = len(whole) - 12
    chunk = (1).to_bytes(4) + b"iCCP\0" + zlib.crc32(b"iCCP\0").to_bytes(4)
    sample = EncodedSample("00007.tar", "k1", "png", whole[:end] + chunk + whole[end:], None)
    with pytest.raises(BadSampleError, match=r"shard 00007\.tar, key k1: the image is damaged"):
        decode_into(np.zeros((64, 64, 3), dtype=np.uint8), sample)


def test_palette_image_is_refused_rather_than_read_as_grey() -> None:
    with pytest.raises(BadSampleError, match="key k1: PNG mode P, expected L"):
        decode_into(np.zeros((64, 64, 1), dtype=np.uint8), encoded(picture(1), "png", mode="P"))


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_damaged_image_names_shard_and_key(kind: str) -> None:
    whole = encoded(picture(3), kind)
    out = np.zeros((64, 64, 3), dtype=np.uint8)
    middle = len(whole.content) // 2
    for content in (whole.content[:middle], whole.content[:9], whole.content[:2], b"", b"no image at all"):
        with pytest.raises(BadSampleError, match=r"shard 00007\.tar, key k1: the image is damaged"):
            decode_into(out, whole._replace(content=content))
