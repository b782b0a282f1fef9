"""One image file -> one prepared sample: square, resized, encoded. Runs in the workers of `data.prepare`."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from data.images.decode import BadImageError, ImageFile
from data.sources.kinds import START_BYTES, foreign_kind
from data.sources.source import Item, Source, hash_of

_JPEG_MIN_SIZE = 64
"""Smaller images are PNG: JPEG's 8 px blocks would show, and save hardly anything."""
_JPEG_QUALITY = 95
TOO_SMALL = "is too small"
"""Start of the reason that `PreparedForm.upscale` remedies."""


@dataclass(frozen=True, kw_only=True)
class PreparedForm:
    """Form of a prepared image."""

    size: int
    """Height and width in pixels."""
    channels: Literal[1, 2, 3]
    """1 grey, 3 RGB; 2 for points in the plane, stored as PNG grey and alpha."""
    upscale: bool
    """Enlarge smaller images instead of refusing them."""
    colour: Literal["srgb", "keep"] = "srgb"
    """Convert colour profiles to sRGB, or ignore them."""
    max_pixels: int = 200_000_000
    """Of an image that is decoded; larger ones are refused."""

    @property
    def extension(self) -> str:
        """Type of the encoded image."""
        return "jpg" if self.size >= _JPEG_MIN_SIZE else "png"


class Prepared(NamedTuple):
    """A sample ready to be written, or the reason for its absence."""

    item: Item
    content: bytes
    error: str | None = None
    source_hash: int = 0
    """`hash_of` for the bytes that the source gave."""


def prepare_items(source: Source, items: list[Item], form: PreparedForm) -> list[Prepared]:
    """Read and encode some images of a source; unusable ones are reported, not raised."""
    return [_prepare_item(source, item, form) for item in items]


def _prepare_item(source: Source, item: Item, form: PreparedForm) -> Prepared:
    found = b""
    try:
        found = source.read(item)
        return Prepared(item, encode_image(found, form), source_hash=hash_of(item, found))
    except BadImageError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    return Prepared(item, b"", reason, hash_of(item, found))


def encode_image(content: bytes, form: PreparedForm) -> bytes:
    """Resize the short side to the wanted size with antialiasing, crop the centre, encode.

    Args:
        content: an image file in one of the known formats.
        form: form of the result.

    Raises:
        BadImageError: unreadable, truncated, too small, or without a plain grey or RGB form.
    """
    return _encode(square_image(content, form), form)


def square_image(content: bytes, form: PreparedForm) -> Image.Image:
    """The image that `encode_image` encodes, of mode L or RGB; raises what it raises."""
    try:
        with warnings.catch_warnings():
            # PIL warns about sizes that `max_pixels` allows, and about unused metadata.
            warnings.simplefilter("ignore")
            return _resize(_load(ImageFile(content), form), form)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(foreign_kind(content[:START_BYTES]) or "is no image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"has more than {form.max_pixels} pixels") from None
    except MemoryError:
        raise
    # On damaged input the decoders raise nearly anything, including TypeError and struct.error.
    except Exception as error:
        raise BadImageError(f"is damaged: {error}") from None


def _load(file: ImageFile, form: PreparedForm) -> Image.Image:
    width, height = file.size
    if width * height > form.max_pixels:
        raise BadImageError(f"has {width}x{height} pixels, more than {form.max_pixels}")
    if min(width, height) < form.size and not form.upscale:
        raise BadImageError(f"{TOO_SMALL}: {width}x{height}, the short side must be at least {form.size}")
    if form.channels == 2:
        return file.decode(keep_alpha=True)
    return file.decode(keep_colours=form.colour == "keep").convert("L" if form.channels == 1 else "RGB")


def _resize(image: Image.Image, form: PreparedForm) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    if side == form.size:
        return image.crop(square)
    # Lanczos widens with the reduction, so it averages over dropped pixels.
    filtering = Image.Resampling.LANCZOS if side > form.size else Image.Resampling.BICUBIC
    return image.resize((form.size, form.size), filtering, box=square)


def _encode(image: Image.Image, form: PreparedForm) -> bytes:
    stream = io.BytesIO()
    if form.extension == "jpg":
        image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
