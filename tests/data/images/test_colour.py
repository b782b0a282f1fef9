"""Colour profiles: converted to sRGB, or without effect where they are sRGB, damaged or of other channels."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.images.decode import ImageFile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def tag(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    return name, body.ljust(-(-len(body) // 4) * 4, b"\0")


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def profile(space: bytes, *, gamma: float = 2.2) -> bytes:
    """An ICC profile, version 2: Adobe RGB's primaries (adapted to D50), or grey, with a power curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = [tag(b"wtpt", xyz(0.9642, 1, 0.8249)), tag(b"desc", b"desc\0\0\0\0\0\0\0\2x" + bytes(80))]
    if space == b"RGB ":
        columns = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
        tags += [tag(name, xyz(*column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)]
        tags += [tag(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    else:
        tags.append(tag(b"kTRC", curve))
    place = 128 + 4 + 12 * len(tags)
    table, bodies = struct.pack(">I", len(tags)), b""
    for name, body in tags:
        table += name + struct.pack(">II", place + len(bodies), len(body))
        bodies += body
    header = struct.pack(">I4xI", place + len(bodies), 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + table + bodies


def png_of(image: Image.Image, icc: bytes) -> ImageFile:
    stream = io.BytesIO()
    image.save(stream, "PNG", icc_profile=icc)
    return ImageFile(stream.getvalue())


def colour_of(image: Image.Image, icc: bytes, *, keep_colours: bool = False) -> list[int]:
    return np.asarray(png_of(image, icc).decode(keep_colours=keep_colours).convert("RGB"))[1, 1].tolist()


def test_wide_colours_are_converted_to_srgb_unless_they_are_kept() -> None:
    # (200, 100, 50) of Adobe RGB (1998) is (229, 99, 45) in sRGB, by the matrices and curves of both standards.
    linear = (np.array([200, 100, 50]) / 255) ** 2.2
    to_xyz = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    from_xyz = np.linalg.inv([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    wanted = (from_xyz @ to_xyz @ linear).clip(0, 1)
    expected = 255 * np.where(wanted > 0.0031308, 1.055 * wanted ** (1 / 2.4) - 0.055, 12.92 * wanted)
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert np.abs(np.array(colour_of(image, profile(b"RGB "))) - expected).max() <= 2
    assert np.abs(expected - [200, 100, 50]).max() > 20
    assert colour_of(image, profile(b"RGB "), keep_colours=True) == [200, 100, 50]


def test_grey_profile_is_converted() -> None:
    # Linear light of 55/255 is 0.2157, which sRGB stores as 128.
    assert colour_of(Image.new("L", (4, 4), 55), profile(b"GRAY", gamma=1.0)) == pytest.approx([128] * 3, abs=2)


def test_transparency_is_put_on_white_after_the_conversion() -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 255))
    assert colour_of(image, profile(b"RGB ")) == colour_of(image.convert("RGB"), profile(b"RGB "))
    image.putpixel((1, 1), (0, 0, 0, 0))
    assert colour_of(image, profile(b"RGB ")) == [255] * 3
    palette = image.convert("RGB").convert("P")
    assert palette.mode == "P"
    assert colour_of(palette, profile(b"RGB ")) == colour_of(palette.convert("RGB"), profile(b"RGB "))


@pytest.mark.parametrize(
    "icc",
    [SRGB, profile(b"GRAY"), profile(b"RGB ")[:200], b"x", bytes(500), profile(b"RGB ").replace(b"mntr", b"link")],
    ids=["sRGB", "other channels", "cut off", "short", "zeros", "device link"],
)
def test_profile_that_is_srgb_or_unusable_changes_nothing(icc: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(png_of(Image.fromarray(pixels), icc).decode().convert("RGB")), pixels)
