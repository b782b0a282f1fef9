"""Decodes an image file. Damaged metadata are ignored; pixels that would be incomplete or wrong are refused."""

import io
import re

import numpy as np
import simplejpeg
from PIL import Image

from data.images.colour import to_srgb
from data.images.metadata import separate

_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
"""Allowed decoders: some others run programs."""
_PNG_RGB = 2
_TIFF_BITS, _TIFF_COLOURS, _TIFF_SAMPLES, _TIFF_PLANES = 258, 262, 277, 284
_WHITE_IS_ZERO = 0
_SEPARATE_PLANES = 2
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Exif orientation -> transpose that makes the image upright."""


class BadImageError(ValueError):
    """An image cannot be used; the message says why."""


class ImageFile:
    """An image file whose header has been read. Damaged files may raise any exception, here and in `decode`."""

    def __init__(self, content: bytes) -> None:
        """Read the header.

        Raises:
            PIL.UnidentifiedImageError: no known format.
        """
        self._parts = separate(content)
        self._image = Image.open(io.BytesIO(self._parts.content), formats=_FORMATS)
        self.size = self._image.size
        """Width and height in pixels."""

    @property
    def has_wide_planes(self) -> bool:
        """Whether it is a TIFF with separate planes of more than 8 bits, which is refused here."""
        return self._image.format == "TIFF" and _has_wide_planes(self._image)

    def decode(self, *, keep_colours: bool = False, keep_alpha: bool = False) -> Image.Image:
        """Decode the pixels, and turn them upright.

        Args:
            keep_colours: ignore a colour profile instead of converting to sRGB.
            keep_alpha: return pixels and alpha as they are stored.

        Returns:
            Any mode that PIL converts to L and RGB; transparent parts are put on white.

        Raises:
            BadImageError: incomplete pixels, or pixels without an agreed meaning.
        """
        image = self._pixels()
        if self._parts.damage:
            raise BadImageError(self._parts.damage)
        if (turn := _TURNS.get(self._parts.orientation)) is not None:
            image = image.transpose(turn)
        if keep_alpha:
            return image
        profile = None if keep_colours else self._parts.profile
        if image.has_transparency_data:
            return self._on_white(image, profile)
        if profile is None:
            return image
        return to_srgb(image if image.mode in ("L", "CMYK") else image.convert("RGB"), profile)

    def _on_white(self, image: Image.Image, profile: bytes | None) -> Image.Image:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        if alpha.getextrema()[1] == 0:
            if self._image.format != "BMP":
                raise BadImageError("is transparent everywhere")
            # Programs that write BMP often leave the fourth byte of each pixel zero.
            alpha = Image.new("L", alpha.size, 255)
            with_alpha.putalpha(alpha)
        if profile is not None:
            colours = to_srgb(image.convert("L" if image.mode in ("L", "LA") else "RGB"), profile).convert("RGB")
            colours.putalpha(alpha)
            with_alpha = colours
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha)
        return flat.convert("RGB")

    def _pixels(self) -> Image.Image:
        """The decoded image; grey of more than 8 bits is reduced to 8."""
        image = self._image
        # Not `image.draft`: decoding a JPEG at a fraction of its size is faster, but the result differs from the
        # filtered full image by up to 2.5 grey levels on average (photographs, to 64 px), as much as the final
        # encoding.
        if image.format == "JPEG":
            return _decode_jpeg(self._parts.content, image)
        if image.format == "PNG":
            self._correct_transparency()
        elif image.format == "TIFF" and _tiff_tag(image, _TIFF_COLOURS) is None:
            raise BadImageError("is a TIFF that does not say how its numbers mean colours; convert it")
        elif _has_wide_planes(image):
            raise BadImageError("is a TIFF with separate planes of more than 8 bits; convert it to 8 bits")
        bits = _tiff_tag(image, _TIFF_BITS) or 16 if image.format == "TIFF" else 16
        is_negative = image.format == "TIFF" and _tiff_tag(image, _TIFF_COLOURS) == _WHITE_IS_ZERO
        image.load()
        if image.mode.startswith("I;16"):
            # PIL would clip at 255.
            return _reduced(image, bits, is_negative=is_negative)
        if image.mode == "I" and image.format == "PPM":
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "LAB":
            return image.convert("RGB")
        if image.mode in ("I", "F"):
            raise BadImageError(f"has pixels of mode {image.mode}, which have no agreed range; convert it to 8 bits")
        return image

    def _correct_transparency(self) -> None:
        """Scale the transparent colour of a PNG like the pixels."""
        image, content = self._image, self._parts.content
        bits, colours = content[24], content[25]
        transparent = image.info.get("transparency")
        if bits == 16 and colours == _PNG_RGB and transparent is not None:
            raise BadImageError("is a PNG of 16 bits with a transparent colour; convert it to 8 bits")
        if isinstance(transparent, int) and image.mode == "L":
            levels = 2**bits - 1
            image.info["transparency"] = (transparent & levels) * (255 // levels)
        elif isinstance(transparent, tuple):
            image.info["transparency"] = tuple(level & 255 for level in transparent)


def _reduced(image: Image.Image, bits: int, *, is_negative: bool) -> Image.Image:
    """Grey of up to 16 bits -> L, or LA with a transparent level."""
    levels = np.asarray(image)
    grey = (levels >> (bits - 8)).astype(np.uint8)
    reduced = Image.fromarray(255 - grey if is_negative else grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        reduced.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return reduced


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _has_wide_planes(image: Image.Image) -> bool:
    """Whether PIL would mix up the bytes of a TIFF with several planes."""
    planes = _tiff_tag(image, _TIFF_PLANES) == _SEPARATE_PLANES and _tiff_tag(image, _TIFF_SAMPLES) != 1
    return planes and _tiff_tag(image, _TIFF_BITS) != 8


def _decode_jpeg(content: bytes, image: Image.Image) -> Image.Image:
    """Decode a JPEG, and refuse it if libjpeg warns: it would fill what is missing with grey."""
    space = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}.get(image.mode)
    if space is None:
        raise BadImageError(f"has pixels of mode {image.mode}; convert it to RGB")
    try:
        pixels = simplejpeg.decode_jpeg(content, colorspace=space)
    except ValueError as error:
        if not _is_padding(str(error), content):
            raise BadImageError(f"is damaged: {error}") from None
        pixels = simplejpeg.decode_jpeg(content, colorspace=space, strict=False)
    if space == "CMYK":
        # PIL knows in which sense the inks are stored.
        image.load()
        return image
    return Image.fromarray(pixels[..., 0] if space == "GRAY" else pixels)


def _is_padding(warning: str, content: bytes) -> bool:
    """Whether a warning of libjpeg is about zeros before the end mark, which some cameras write."""
    found = re.search(r"(\d+) extraneous bytes before marker 0xd9", warning)
    return found is not None and bytes(int(found[1])) + b"\xff\xd9" in content
