"""Writes image files that PIL does not write: each bit depth, byte order and layout, with any metadata."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Levels = npt.NDArray[np.uint16]
"""Grey [H, W] or colours [H, W, C] of 16 bits."""


def ramp(channels: int = 1, *, height: int = 24, width: int = 32) -> Levels:
    """Ramps in several directions; the last channels of four is opaque."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 2000, y * 2500, (x + y) * 1100, x * 0 + 65535][:channels]
    return np.stack(planes, axis=-1).astype(np.uint16) if channels > 1 else (x * 1200 + y * 1000).astype(np.uint16)


def packed(levels: Levels, bits: int, order: str = ">") -> list[bytes]:
    """The rows of pixels at a bit depth."""
    if bits == 16:
        return [row.astype(f"{order}u2").tobytes() for row in levels]
    rows = (levels >> (16 - bits)).reshape(len(levels), -1)
    if bits == 8:
        return [row.astype(np.uint8).tobytes() for row in rows]
    texts = ["".join(f"{level:0{bits}b}" for level in row) for row in rows.tolist()]
    return [int(text + "0" * (-len(text) % 8), 2).to_bytes(-(-len(text) // 8)) for text in texts]


def tiff(
    levels: Levels,
    *,
    colours: int | None,
    bits: int,
    planes: int = 1,
    order: str = "<",
    deflate: bool = False,
    extra: Sequence[int] = (),
    tags: Sequence[tuple[int, int, bytes]] = (),
) -> bytes:
    """A TIFF of one strip per plane.

    Args:
        levels: the pixels.
        colours: tag 262: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK; None: no tag.
        bits: of each sample.
        planes: tag 284: 2 stores each channel apart.
        order: byte order.
        deflate: compress the strips.
        extra: tag 338, the meaning of alpha.
        tags: further tags: number, type, content; the count is the number of bytes.
    """
    channels = levels.shape[2] if levels.ndim == 3 else 1
    parts = [levels[..., c] for c in range(channels)] if planes == 2 and channels > 1 else [levels]
    strips = [b"".join(packed(part, bits, order)) for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    content = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    places = []
    for strip in strips:
        places.append(len(content))
        content += strip
    entries: list[tuple[int, int, int, bytes]] = []

    def add(tag: int, *values: int, form: str = "H") -> None:
        kind = 3 if form == "H" else 4
        entries.append((tag, kind, len(values), struct.pack(f"{order}{len(values)}{form}", *values)))

    height, width = levels.shape[:2]
    add(256, width)
    add(257, height)
    add(258, *[bits] * channels)
    add(259, 8 if deflate else 1)
    if colours is not None:
        add(262, colours)
    add(273, *places, form="I")
    add(277, channels)
    add(278, height)
    add(279, *map(len, strips), form="I")
    add(284, planes)
    if extra:
        add(338, *extra)
    entries += [(tag, kind, len(value), value) for tag, kind, value in tags]
    directory = b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place = len(content)
            content += value
            value = struct.pack(f"{order}I", place)
        directory += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    content[4:8] = struct.pack(f"{order}I", len(content))
    return bytes(content) + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def png_part(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(levels: Levels, *, colours: int, bits: int, transparent: bytes = b"", metadata: bytes = b"") -> bytes:
    """A PNG; colours are 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha. Metadata go before the pixels."""
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed(levels, bits)))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_part(b"IHDR", header),
            metadata,
            png_part(b"tRNS", transparent) if transparent else b"",
            png_part(b"IDAT", pixels),
            png_part(b"IEND", b""),
        ]
    )


def bmp(pixels: npt.NDArray[np.uint8], *, has_alpha_mask: bool = True) -> bytes:
    """A BMP of 32 bits per pixel, [H, W, 4] in the order blue, green, red, alpha."""
    height, width = pixels.shape[:2]
    body = pixels[::-1].tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000 if has_alpha_mask else 0)
    header = struct.pack("<IiiHHIIiiII4I", 108, width, height, 1, 32, 3, len(body), 2835, 2835, 0, 0, *masks)
    place = 14 + 108
    return b"BM" + struct.pack("<IHHI", place + len(body), 0, 0, place) + header.ljust(108, b"\0") + body


def jpeg_part(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_jpeg_parts(jpeg: bytes, *parts: bytes) -> bytes:
    """A JPEG with further parts after its first marker."""
    return jpeg[:2] + b"".join(parts) + jpeg[2:]


def exif(orientation: int, order: str = "<", *, kind: int = 3, count: int = 1) -> bytes:
    """An Exif block that states only the orientation, as one number of 16 bits by default."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    number = struct.pack(f"{order}H", orientation).ljust(4, b"\0")
    tag = struct.pack(f"{order}HHI", 274, kind, count) + number
    return start + struct.pack(f"{order}IH", 8, 1) + tag + bytes(4)


def webp_part(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def with_webp_parts(webp: bytes, *parts: bytes, flags: int = 0x2C) -> bytes:
    """A plain WebP as an extended one, with metadata after its pixels; the flags announce profile, Exif and XMP."""
    pixels = webp[12:]
    width, height = (struct.pack("<I", side - 1)[:3] for side in (32, 24))
    body = b"WEBP" + webp_part(b"VP8X", bytes([flags, 0, 0, 0]) + width + height) + pixels + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body
