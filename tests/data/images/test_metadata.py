"""Metadata never make a good image bad; orientation and profile survive in every format."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.images.decode import ImageFile
from data.images.metadata import separate
from tests.data.images.odd_files import (
    exif,
    jpeg_part,
    png,
    png_part,
    ramp,
    tiff,
    webp_part,
    with_jpeg_parts,
    with_webp_parts,
)

GREY = Image.fromarray((ramp() >> 8).astype(np.uint8))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def saved(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    GREY.convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(ImageFile(content).decode().convert("RGB"))


PLAIN = {
    "JPEG": saved("JPEG"),
    "PNG": png(ramp(), colours=0, bits=8),
    "WEBP": saved("WEBP", lossless=True),
    "TIFF": tiff(ramp(), colours=1, bits=8),
}


def with_metadata(
    kind: str, exif_block: bytes = b"", xmp: bytes = b"", profile: bytes = b"", text: bytes = b""
) -> bytes:
    match kind:
        case "JPEG":
            half = len(profile) // 2
            parts = [
                jpeg_part(0xE1, b"Exif\0\0" + exif_block) if exif_block else b"",
                jpeg_part(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp) if xmp else b"",
                jpeg_part(0xE2, b"ICC_PROFILE\0\2\2" + profile[half:]) if profile else b"",
                jpeg_part(0xE2, b"ICC_PROFILE\0\1\2" + profile[:half]) if profile else b"",
                jpeg_part(0xFE, text) if text else b"",
            ]
            return with_jpeg_parts(PLAIN[kind], *parts)
        case "PNG":
            parts = [
                png_part(b"eXIf", exif_block) if exif_block else b"",
                png_part(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) if xmp else b"",
                png_part(b"iCCP", b"name\0\0" + zlib.compress(profile)) if profile else b"",
                png_part(b"tEXt", b"comment\0" + text) if text else b"",
            ]
            return png(ramp(), colours=0, bits=8, metadata=b"".join(parts))
        case "WEBP":
            named = {b"ICCP": profile, b"EXIF": exif_block, b"XMP ": xmp}
            return with_webp_parts(PLAIN[kind], *(webp_part(name, body) for name, body in named.items() if body))
        case _:
            orientation = [(274, 3, exif_block[18:20])] if exif_block else []
            tags = [*orientation, (270, 2, text), (700, 1, xmp), (34675, 7, profile)]
            return tiff(ramp(), colours=1, bits=8, tags=[tag for tag in tags if tag[2]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_read_from_exif_or_else_from_xmp(kind: str) -> None:
    for order in "<>":
        assert separate(with_metadata(kind, exif(8, order), XMP)).orientation == 8
    assert separate(with_metadata(kind, xmp=XMP)).orientation == 6
    assert separate(PLAIN[kind]).orientation is None


@pytest.mark.parametrize("block", [exif(0), exif(9), exif(3, kind=2), exif(3, count=2)])
def test_orientation_that_is_none_is_ignored(block: bytes) -> None:
    assert separate(with_metadata("JPEG", block)).orientation is None


def test_tiff_is_turned_once() -> None:
    # Two bytes, so that the count of the tag must be mended to one number.
    content = with_metadata("TIFF", exif(3)).replace(struct.pack("<HHI", 274, 3, 2), struct.pack("<HHI", 274, 3, 1))
    assert np.array_equal(pixels(content), pixels(PLAIN["TIFF"])[::-1, ::-1])
    assert np.array_equal(pixels(with_metadata("TIFF", xmp=XMP)), np.rot90(pixels(PLAIN["TIFF"]), -1))


def test_exif_of_imagemagick_in_a_png_is_read() -> None:
    digits = exif(6).hex().encode()
    text = b"\nexif\n%8d\n%b\n" % (len(digits) // 2, digits)
    for part in (
        png_part(b"tEXt", b"Raw profile type exif\0" + text),
        png_part(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
    ):
        assert separate(png(ramp(), colours=0, bits=8, metadata=part)).orientation == 6


@pytest.mark.parametrize("kind", PLAIN)
def test_profile_is_found_and_the_rest_is_the_plain_file(kind: str) -> None:
    parts = separate(with_metadata(kind, exif(1) if kind != "TIFF" else b"", b"<x/>", PROFILE, b"text " * 9))
    assert parts.profile == PROFILE
    assert not parts.damage
    if kind in ("JPEG", "PNG"):
        assert parts.content == PLAIN[kind]
    assert np.array_equal(pixels(parts.content), pixels(PLAIN[kind]))


@pytest.mark.parametrize(
    "part",
    [
        png_part(b"gAMA", b"\0"),
        png_part(b"iCCP", b"x"),
        png_part(b"eXIf", bytes(20)),
        png_part(b"pHYs", b"\0"),
        png_part(b"tEXt", b"comment\0" + bytes(3_000_000)),
        png_part(b"zTXt", b"comment\0\0" + zlib.compress(bytes(3_000_000))),
        png_part(b"tEXt", b"Raw profile type exif\0\nexif\n 2\nxy"),
        png_part(b"acTL", b"\0"),
        png_part(b"tIME", b"12")[:-1] + b"\0",
    ],
    ids=lambda part: part[4:8].decode(),
)
def test_damaged_or_long_parts_of_a_png_are_passed_over(part: bytes) -> None:
    assert np.array_equal(pixels(png(ramp(), colours=0, bits=8, metadata=part)), pixels(PLAIN["PNG"]))


@pytest.mark.parametrize(
    "part",
    [
        jpeg_part(0xE0, b"JFIF\0"),
        jpeg_part(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        jpeg_part(0xE2, b"ICC_PROFILE\0"),
        jpeg_part(0xE2, b"MPF\0II*\0"),
        jpeg_part(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1x"),
        jpeg_part(0xEE, b"Adobe"),
    ],
    ids=["JFIF", "Exif", "ICC", "MPF", "Photoshop", "Adobe"],
)
def test_damaged_parts_of_a_jpeg_are_passed_over(part: bytes) -> None:
    assert np.array_equal(pixels(with_jpeg_parts(PLAIN["JPEG"], part)), pixels(PLAIN["JPEG"]))


def test_webp_that_is_cut_off_in_its_metadata_keeps_its_pixels() -> None:
    content = with_metadata("WEBP", exif(1), XMP)
    for length in range(len(content) - len(XMP) - 40, len(content), 7):
        assert np.array_equal(pixels(content[:length]), pixels(PLAIN["WEBP"]))


@pytest.mark.parametrize("kind", PLAIN)
def test_no_change_of_metadata_makes_the_image_bad(kind: str) -> None:
    draws = random.Random(0)
    for _ in range(60):
        blocks = [bytearray(block) for block in (exif(1), b"<x:xmpmeta/>" * 3, PROFILE, b"comment " * 5)]
        for block in blocks:
            for _ in range(draws.randint(1, 6)):
                block[draws.randrange(len(block))] = draws.choice([0, 1, 255, draws.randrange(256)])
            del block[draws.choice([len(block), draws.randrange(1, len(block))]) :]
        # A tag of another type is no orientation; the profile may change the colours.
        content = with_metadata(kind, bytes(blocks[0]) if kind != "TIFF" else b"", *map(bytes, blocks[1:]))
        turned = ImageFile(content).decode(keep_colours=True).convert("RGB")
        assert sorted(turned.size) == [24, 32]
        assert np.array_equal(np.unique(np.asarray(turned)), np.unique(pixels(PLAIN[kind])))
        ImageFile(content).decode()
