"""Geometry and antialiasing of the resize, and the reasons for which an image is left out."""

import io
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.prepare.encode import BadImageError, PreparedForm, encode_image, prepare_items
from data.sources.find import open_source


def form(size: int, channels: Literal[1, 3] = 3, *, upscale: bool = False) -> PreparedForm:
    return PreparedForm(size=size, channels=channels, upscale=upscale)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_centre_of_a_wide_image_is_kept() -> None:
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = (10, 200, 30)
    assert (decoded(encode_image(file_of(Image.fromarray(pixels)), form(16))) == (10, 200, 30)).all()
    assert (decoded(encode_image(file_of(Image.fromarray(pixels.transpose(1, 0, 2))), form(16))) == (10, 200, 30)).all()


def test_image_of_the_wanted_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decoded(encode_image(file_of(Image.fromarray(pixels)), form(16))), pixels)


def test_reduction_averages_instead_of_picking_pixels() -> None:
    checkerboard = ((np.indices((128, 128)).sum(0) % 2) * 255).astype(np.uint8)
    small = decoded(encode_image(file_of(Image.fromarray(checkerboard)), form(8, 1)))
    # Every pixel is the mean of 256 black and white ones: 127 or 128, but for the filter's rounding.
    assert np.abs(small.astype(int) - 127.5).max() <= 1.5


def test_png_below_64_pixels_and_jpeg_without_subsampling_from_there() -> None:
    content = file_of(Image.new("RGB", (80, 80), "red"))
    assert Image.open(io.BytesIO(encode_image(content, form(63)))).format == "PNG"
    jpeg = Image.open(io.BytesIO(encode_image(content, form(64))))
    assert jpeg.format == "JPEG"
    # 95, by the tables of Annex K of the JPEG standard scaled as libjpeg does: at 95 to a tenth.
    brightness = [16, 11, 10, 16, 24, 40, 51, 61]
    tables = jpeg.quantization  # pyright: ignore[reportAttributeAccessIssue]
    assert tables[0][:8] == [(10 * value + 50) // 100 for value in brightness]
    # One sampling factor of 1x1 for each channel.
    assert [layer[1:3] for layer in jpeg.layer] == [(1, 1)] * 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("size", [32, 64])
def test_grey_is_kept_as_one_channel(size: int) -> None:
    assert decoded(encode_image(file_of(Image.new("RGB", (80, 80), "red")), form(size, 1))).shape == (size, size)


@pytest.mark.parametrize("orientation", range(10))
def test_camera_orientation_is_applied(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(Image.fromarray(pixels), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decoded(encode_image(content, form(16))), np.asarray(upright))
    assert np.array_equal(pixels, np.asarray(upright)) == (orientation not in range(2, 9))


def test_tag_of_a_wrong_type_does_not_make_a_turned_photograph_bad() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "a maker of cameras"
    pixels = np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 16, 16, axis=1)
    content = file_of(Image.fromarray(pixels), "JPEG", quality=100, exif=exif)
    # Its maker, tag 0x010F, is text, type 2, of 19 bytes; now it is a fraction, type 5.
    found, wrong = struct.pack(">HHI", 0x010F, 2, 19), struct.pack(">HHI", 0x010F, 5, 1)
    assert content.count(found) == 1
    upright = decoded(encode_image(content.replace(found, wrong), form(16, 1)))
    assert np.abs(upright.astype(int) - pixels[::-1]).max() <= 2


def test_sixteen_bit_grey_is_scaled_and_transparency_is_put_on_white() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(decoded(encode_image(file_of(Image.fromarray(ramp)), form(16, 1))).ravel(), np.arange(256))
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    flat = decoded(encode_image(file_of(clear), form(16)))
    assert flat[0, 0].tolist() == [0, 0, 255]
    assert (flat[1:] == 255).all()


def test_small_image_is_bad_unless_it_may_be_enlarged() -> None:
    content = file_of(Image.new("RGB", (40, 10)))
    with pytest.raises(BadImageError, match="is too small: 40x10, the short side must be at least 16"):
        encode_image(content, form(16))
    assert decoded(encode_image(content, form(16, upscale=True))).shape == (16, 16, 3)


def png_header_of(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT"


@pytest.mark.parametrize("side", [15_000, 60_000])
def test_image_of_too_many_pixels_is_bad_before_it_is_decoded(side: int) -> None:
    with pytest.raises(BadImageError, match="pixels"):
        encode_image(png_header_of(side, side) + bytes(100), form(16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_image_is_bad(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = file_of(Image.fromarray(noise), kind)
    assert decoded(encode_image(content, form(16))).shape == (16, 16, 3)
    with pytest.raises(BadImageError):
        encode_image(content[: len(content) // 2], form(16))


def test_header_of_a_wrong_type_is_bad() -> None:
    content = file_of(Image.new("L", (16, 16)), "TIFF")
    # The offset of the pixels, tag 273, is a number, type 4; now it is text, type 2.
    number, text = struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 2, 1)
    assert content.count(number) == 1
    with pytest.raises(BadImageError, match="is damaged: 'str' object cannot be interpreted as an integer"):
        encode_image(content.replace(number, text), form(16))


def test_formats_whose_decoders_run_programs_are_not_opened() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    for content in (b"", b"text", postscript):
        with pytest.raises(BadImageError, match="is no image of a known format"):
            encode_image(content, form(16))


def test_bad_image_is_reported_next_to_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(Image.new("RGB", (16, 16))))
    (tmp_path / "b.png").write_bytes(b"text")
    (tmp_path / "c.png").write_bytes(b"text")
    source = open_source(str(tmp_path))
    (tmp_path / "c.png").unlink()
    good, bad, gone = prepare_items(source, list(source.items), form(16))
    assert good.error is None
    assert (bad.item.name, bad.error) == ("b.png", "is no image of a known format")
    assert gone.error == "cannot be read: No such file or directory"


def test_real_photographs_equal_a_plain_crop_and_resize(photos: Path) -> None:
    source = open_source(str(photos))
    for item in source.items[:20]:
        content = source.read(item)
        ours = decoded(encode_image(content, form(48)))
        image = Image.open(io.BytesIO(content)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        plain = image.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.LANCZOS)
        # The filter reaches three pixels far; next to the border, ours sees what the crop has cut off.
        assert np.array_equal(ours[3:-3, 3:-3], np.asarray(plain)[3:-3, 3:-3])
