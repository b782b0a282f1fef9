"""Pixels of odd files: equal to what a second decoder reads, or refused."""

import io
import struct

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data.images.decode import BadImageError, ImageFile
from tests.data.images.odd_files import bmp, png, png_part, ramp, tiff

Pixels = npt.NDArray[np.int64]


def decoded(content: bytes) -> Pixels:
    return np.asarray(ImageFile(content).decode().convert("RGB")).astype(np.int64)


def by_opencv(content: bytes) -> Pixels:
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels[..., ::-1].astype(np.int64)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photograph(width: int = 200, height: int = 160) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x * 0.05), np.cos(y * 0.07), np.sin((x + y) * 0.03)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype(np.uint8))


READ_BY_BOTH = {
    **{
        f"tiff of {bits} bits, {colours}, {order}{' deflated' * deflate}": tiff(
            ramp(), colours=colours, bits=bits, order=order, deflate=deflate
        )
        for colours, bits, order in [(0, 1, "<"), (0, 8, ">"), (0, 16, "<"), (1, 1, ">"), (1, 8, "<"), (1, 16, ">")]
        for deflate in (False, True)
    },
    **{f"rgb tiff, {planes} planes": tiff(ramp(3), colours=2, bits=8, planes=planes) for planes in (1, 2)},
    "rgb tiff of 16 bits": tiff(ramp(3), colours=2, bits=16),
    "tiff with opaque alpha": tiff(ramp(4), colours=2, bits=8, extra=[2]),
    "tiff of inks": tiff(ramp(4), colours=5, bits=8),
    "rgb png of 16 bits": png(ramp(3), colours=2, bits=16),
    "png of 4 bits": png(ramp(), colours=0, bits=4),
    "pgm of 16 bits": b"P5 32 24 65535\n" + ramp().astype(">u2").tobytes(),
    "bmp without alpha": bmp((ramp(4) >> 8).astype(np.uint8), has_alpha_mask=False),
    "bmp with alpha 0 everywhere": bmp((ramp(4) >> 8).astype(np.uint8) * np.array([1, 1, 1, 0], np.uint8)),
    "jpeg": file_of(photograph(), "JPEG", quality=90),
    "jpeg in one colour": file_of(photograph().convert("L"), "JPEG"),
    "progressive jpeg": file_of(photograph(), "JPEG", progressive=True, subsampling=2),
    "webp": file_of(photograph(), "WEBP"),
}


@pytest.mark.parametrize("name", READ_BY_BOTH)
def test_pixels_equal_those_of_a_second_decoder(name: str) -> None:
    content = READ_BY_BOTH[name]
    # Of 16 bits, one takes the upper byte and the other rounds; libjpeg and libwebp differ in their last bit.
    assert np.abs(decoded(content) - by_opencv(content)).max() <= (3 if "webp" in name or "jpeg" in name else 1)


@pytest.mark.parametrize("bits", [2, 4, 12])
@pytest.mark.parametrize("colours", [0, 1])
def test_bit_depths_of_tiff_that_opencv_lacks_use_the_whole_range(bits: int, colours: int) -> None:
    content = tiff(ramp(), colours=colours, bits=bits)
    stored = ramp().astype(np.int64) >> (16 - bits)
    grey = stored * (255 // (2**bits - 1)) if bits < 8 else stored >> (bits - 8)
    if (bits, colours) == (12, 0):
        with pytest.raises(Image.UnidentifiedImageError):
            ImageFile(content)
    else:
        assert np.array_equal(decoded(content)[..., 0], grey if colours else 255 - grey)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_level_of_grey_png_is_put_on_white_at_every_bit_depth(bits: int) -> None:
    stored = ramp().astype(np.int64) >> (16 - bits)
    level = int(stored[5, 7])
    content = png(ramp(), colours=0, bits=bits, transparent=struct.pack(">H", level))
    grey = stored * (255 // (2**bits - 1)) if bits <= 8 else stored >> 8
    assert np.array_equal(decoded(content)[..., 0], np.where(stored == level, 255, grey))


def test_transparent_colour_of_rgb_png_is_put_on_white() -> None:
    colour = (ramp(3) >> 8)[3, 3].tolist()
    pixels = decoded(png(ramp(3), colours=2, bits=8, transparent=struct.pack(">3H", *colour)))
    assert pixels[3, 3].tolist() == [255] * 3
    assert pixels[4, 4].tolist() == (ramp(3) >> 8)[4, 4].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(ramp(3), colours=2, bits=16, planes=2), "separate planes of more than 8 bits"),
        (tiff(ramp(), colours=None, bits=8), "does not say how its numbers mean colours"),
        (png(ramp(3), colours=2, bits=16, transparent=bytes(6)), "PNG of 16 bits with a transparent colour"),
        (file_of(Image.new("RGBA", (9, 9)), "PNG"), "is transparent everywhere"),
        (file_of(Image.new("RGBA", (9, 9)), "WEBP", lossless=True), "is transparent everywhere"),
        (file_of(Image.new("F", (9, 9)), "TIFF"), "mode F, which have no agreed range"),
    ],
)
def test_pixels_that_would_come_out_wrong_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match=message):
        ImageFile(content).decode()


JPEG = file_of(photograph(), "JPEG", quality=90)
END = b"\xff\xd9"


@pytest.mark.parametrize(
    "content",
    [JPEG[:-2], JPEG[: len(JPEG) // 2], JPEG[: len(JPEG) // 2] + END, JPEG[:4000] + bytes(400) + JPEG[4400:]],
    ids=["no end", "cut", "cut and ended", "zeros inside"],
)
def test_jpeg_of_which_libjpeg_warns_is_bad(content: bytes) -> None:
    with pytest.raises(BadImageError, match=r"is damaged: .*[Pp]remature end"):
        ImageFile(content).decode()


@pytest.mark.parametrize(
    "content",
    [
        JPEG + b"more",
        JPEG + JPEG,
        JPEG[:-2] + bytes(8) + END,
        JPEG[:-2] + b"\xff" * 8 + END,
        JPEG[:20] + b"x" + JPEG[20:],
    ],
    ids=["after the end", "another image", "zeros before the end", "fill bytes", "between the parts"],
)
def test_extra_bytes_do_no_harm_to_a_jpeg(content: bytes) -> None:
    assert np.array_equal(decoded(content), decoded(JPEG))


def test_numbers_that_no_pixel_depends_on_do_no_harm_to_a_jpeg() -> None:
    version = JPEG.index(b"JFIF\0") + 5
    # Of the scan: 0 to 63, of which libjpeg warns if it is 0 to 0 in a sequential JPEG.
    scan = JPEG.index(b"\xff\xda") + 2 + int.from_bytes(JPEG[JPEG.index(b"\xff\xda") + 2 :][:2]) - 3
    assert JPEG[scan : scan + 3] == b"\0\x3f\0"
    for place, value in ((version, 3), (scan + 1, 0)):
        odd = bytearray(JPEG)
        odd[place] = value
        assert np.array_equal(decoded(bytes(odd)), decoded(JPEG))
        with pytest.raises(BadImageError, match=r"[Pp]remature end"):
            ImageFile(bytes(odd[: len(odd) // 2]) + END).decode()


def test_png_with_a_wrong_checksum_of_its_pixels_or_without_an_end_is_bad() -> None:
    content = png(ramp(), colours=0, bits=8)
    end = png_part(b"IEND", b"")
    flipped = bytearray(content)
    flipped[len(content) - len(end) - 1] ^= 1
    for damaged, message in ((bytes(flipped), "wrong checksum of its part IDAT"), (content[: -len(end)], "is cut off")):
        with pytest.raises(BadImageError, match=message):
            ImageFile(damaged).decode()


@pytest.mark.parametrize("kind", ["CMYK", "RGB"])
def test_inks_of_a_jpeg_are_read_in_their_sense(kind: str) -> None:
    content = file_of(Image.new("RGB", (16, 16), "red").convert(kind), "JPEG", quality=95)
    assert np.abs(decoded(content) - by_opencv(content)).max() <= 3
    assert np.abs(decoded(content)[0, 0] - [255, 0, 0]).max() <= 3
