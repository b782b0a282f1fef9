"""Separates the pixels of an image file from its metadata.

Decoders stop at metadata that they cannot parse, although the pixels are good. A decoder therefore gets a copy without
metadata. Of these, only two change the pixels: the orientation and the colour profile. They are read here, and ignored
where they are damaged.
"""

import re
import struct
import zlib
from typing import Literal, NamedTuple

_MAX_PROFILE_BYTES = 16 * 2**20
"""Real profiles have at most some 4 MB."""
_MAX_TEXT_BYTES = 2**20
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FILL = re.compile(rb"\xff+")
_ORIENTATION_TAG = 274
_PROFILE_TAG = 34675
_XMP_TAG = 700
_TIFF_PIXEL_TAGS = frozenset(
    {
        *range(256, 260),  # size, bits, compression
        *(262, 266, 273, 274, 277, 278, 279, 284),  # colours, bit order, strips, orientation, samples, planes
        *(292, 293, 317, 320, *range(322, 326)),  # fax options, predictor, palette, tiles
        *(332, 338, 339, 347, *range(512, 522), *range(529, 533)),  # inks, alpha, numbers, JPEG, YCbCr
    }
)


class Separated(NamedTuple):
    """The parts of an image file."""

    content: bytes
    """The file without metadata."""
    orientation: int | None = None
    """Exif orientation, 1 to 8. None for TIFF, where the decoder applies it."""
    profile: bytes | None = None
    """ICC profile, unchecked."""
    damage: str = ""
    """Fault of the file that some decoders pass over; empty if there is none."""


def separate(content: bytes) -> Separated:
    """Separate a JPEG, PNG, WebP or TIFF. Any other file is returned as it is."""
    if content.startswith(b"\xff\xd8"):
        return _separate_jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _separate_png(content)
    if content[:4] == b"RIFF" and content[8:16] == b"WEBPVP8X":
        return _separate_webp(content)
    if content.startswith(_TIFF_STARTS):
        return _separate_tiff(content)
    return Separated(content)


def _orientation(exif: bytes, xmp: bytes = b"") -> int | None:
    """Orientation from an Exif block, else from XMP; None if neither states a valid one."""
    if directory := _directory(exif.removeprefix(b"Exif\0\0")):
        for entry in directory.entries:
            if entry.tag == _ORIENTATION_TAG:
                number = directory.number(entry)
                return number if number is not None and 1 <= number <= 8 else None
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else None


def _separate_jpeg(content: bytes) -> Separated:
    kept, exif, xmp = bytearray(b"\xff\xd8"), b"", b""
    profile: dict[int, bytes] = {}
    is_sequential = False
    place = 2
    while True:
        # Any bytes before a marker are skipped, as decoders do.
        start = content.find(b"\xff", place)
        if start >= 0:
            # Of a row of them, the last begins the marker.
            start = _FILL.match(content, start).end() - 1  # pyright: ignore[reportOptionalMemberAccess]
        marker = content[start + 1] if 0 <= start < len(content) - 3 else 0xD9
        if marker == 0x00:
            place = start + 2
            continue
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4])
        if marker in (0xD9, 0xDA) or end > len(content):
            # The pixels, or nothing that can be read.
            kept += content[start if start >= 0 else place :]
            if marker == 0xDA and is_sequential and end < len(content):
                # The only values that these frames allow. Some phones write others, of which libjpeg warns.
                kept[len(kept) - len(content) + end - 3 : len(kept) - len(content) + end] = b"\x00\x3f\x00"
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            place = start + 2
            continue
        body = content[start + 4 : end]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # These two decide on the colour space.
        is_jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        is_adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        is_sequential = is_sequential or marker in (0xC0, 0xC1)
        if is_jfif:
            # Of versions after 1 libjpeg warns, although nothing depends on them.
            kept += content[start : start + 9] + b"\1" + content[start + 10 : end]
        elif not is_metadata or is_adobe:
            kept += content[start:end]
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile[body[12]] = body[14:]
        place = end
    joined = b"".join(profile[number] for number in sorted(profile))
    return Separated(bytes(kept), _orientation(exif, xmp), joined or None)


def _separate_png(content: bytes) -> Separated:
    kept = [content[:8]]
    exif, raw_exif, xmp, profile, damage = b"", b"", b"", b"", ""
    place = 8
    while place + 12 <= len(content):
        kind, end = content[place + 4 : place + 8], place + 12 + int.from_bytes(content[place : place + 4])
        if end > len(content):
            break
        body = content[place + 8 : end - 4]
        is_intact = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(content[end - 4 : end])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[place:end])
            if not is_intact:
                damage = f"is damaged: wrong checksum of its part {kind.decode()}"
        elif not kind[0] & 0x20:
            damage = f"is damaged, or no standard PNG: unknown part {kind!r}"
        elif is_intact and kind == b"eXIf":
            exif = body
        elif is_intact and kind == b"iCCP":
            profile = _inflated(body.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
        elif is_intact and kind in (b"tEXt", b"zTXt") and body.startswith(b"Raw profile type exif\0"):
            raw_exif = _raw_profile(body, is_compressed=kind == b"zTXt")
        elif is_intact and kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = body
        place = end
        if kind == b"IEND":
            return Separated(b"".join(kept), _orientation(exif or raw_exif, xmp), profile or None, damage)
    return Separated(b"".join([*kept, content[place:]]), damage=damage or "is cut off: it has no end")


def _raw_profile(body: bytes, *, is_compressed: bool) -> bytes:
    """Exif as ImageMagick writes it: a line feed, the type, the size, and hexadecimal digits, each in lines."""
    text = body.partition(b"\0")[2]
    lines = (_inflated(text[1:], _MAX_TEXT_BYTES) if is_compressed else text[:_MAX_TEXT_BYTES]).split(b"\n")
    try:
        return bytes.fromhex(b"".join(lines[3:]).decode("ascii"))
    except ValueError:
        return b""


def _inflated(content: bytes, max_bytes: int) -> bytes:
    """Unpack; empty if the content is damaged or too long."""
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(content, max_bytes)
    except zlib.error:
        return b""
    return unpacked if stream.eof else b""


def _separate_webp(content: bytes) -> Separated:
    found: dict[bytes, bytes] = {}
    kept = bytearray()
    place, file_end = 12, min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while place + 8 <= file_end:
        kind = content[place : place + 4]
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        if kind in (b"EXIF", b"XMP ", b"ICCP"):
            found.setdefault(kind, content[place + 8 : min(place + 8 + size, file_end)])
        else:
            kept += content[place:end]
        place = end
    if len(kept) > 8:
        # No profile, Exif or XMP is announced any more.
        kept[8] &= ~(0x20 | 0x08 | 0x04)
    head = b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP"
    orientation = _orientation(found.get(b"EXIF", b""), found.get(b"XMP ", b""))
    return Separated(head + bytes(kept), orientation, found.get(b"ICCP"))


class _Entry(NamedTuple):
    tag: int
    kind: int
    """1 and 7: bytes, 3: 16-bit numbers, 4: 32-bit numbers."""
    num_values: int
    value: bytes
    """The value, or its position in the file if it is larger than this field."""
    whole: bytes


class _Directory(NamedTuple):
    """The first directory of tags in a TIFF file or Exif block."""

    content: bytes
    order: str
    is_big: bool
    start: int
    entries: list[_Entry]

    def number(self, entry: _Entry) -> int | None:
        """The value of a tag with one whole number."""
        size = {1: 1, 3: 2, 4: 4}.get(entry.kind)
        return None if size is None or entry.num_values != 1 else int.from_bytes(entry.value[:size], self.byteorder)

    def bytes_of(self, entry: _Entry) -> bytes:
        """The value of a tag with bytes; shorter if the file ends before."""
        if entry.kind not in (1, 7):
            return b""
        if entry.num_values <= len(entry.value):
            return entry.value[: entry.num_values]
        start = int.from_bytes(entry.value, self.byteorder)
        return self.content[start : start + entry.num_values]

    @property
    def byteorder(self) -> Literal["little", "big"]:
        return "little" if self.order == "<" else "big"


def _directory(content: bytes) -> _Directory | None:
    """The first directory; None if there is none."""
    if not content.startswith(_TIFF_STARTS):
        return None
    order, is_big = "<" if content[0] == ord("I") else ">", ord("+") in content[2:4]
    place_form, count_form, entry_form = ("8xQ", "Q", "HHQ8s") if is_big else ("4xI", "H", "HHI4s")
    try:
        (start,) = struct.unpack_from(order + place_form, content)
        (count,) = struct.unpack_from(order + count_form, content, start)
    except struct.error:
        return None
    first, size = start + struct.calcsize(order + count_form), struct.calcsize(order + entry_form)
    entries = []
    for place in range(first, min(first + count * size, len(content) - size + 1), size):
        tag, kind, num_values, value = struct.unpack_from(order + entry_form, content, place)
        entries.append(_Entry(tag, kind, num_values, value, content[place : place + size]))
    return _Directory(content, order, is_big, start, entries)


def _separate_tiff(content: bytes) -> Separated:
    directory = _directory(content)
    if directory is None:
        return Separated(content)
    values = {entry.tag: entry for entry in directory.entries}
    kept = [entry.whole for entry in directory.entries if entry.tag in _TIFF_PIXEL_TAGS]
    # Rewritten in place: offsets stay valid. Zero ends the list of directories.
    count = struct.pack(directory.order + ("Q" if directory.is_big else "H"), len(kept))
    rewritten = count + b"".join(kept) + bytes(8 if directory.is_big else 4)
    pixels = bytearray(content)
    pixels[directory.start : directory.start + len(rewritten)] = rewritten
    orientation = None
    if _ORIENTATION_TAG not in values and _XMP_TAG in values:
        orientation = _orientation(b"", directory.bytes_of(values[_XMP_TAG]))
    profile = directory.bytes_of(values[_PROFILE_TAG])[:_MAX_PROFILE_BYTES] if _PROFILE_TAG in values else None
    return Separated(bytes(pixels), orientation, profile or None)
