"""One image file -> one prepared sample: square, resized, encoded. Runs in the workers of `data.prepare`."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.images.channels import bands, decode, read_planes
from data.images.decode import BadImageError, ImageFile
from data.shards.offsets import PLANES_EXTENSION
from data.sources.kinds import START_BYTES, foreign_kind
from data.sources.source import Item, Source, hash_of

_JPEG_MIN_SIZE = 64
"""Smaller images are PNG: JPEG's 8 px blocks would show, and save hardly anything."""
_JPEG_QUALITY = 95
MAX_PIXELS = 200_000_000
"""Of an image that is decoded; larger ones are refused."""
TOO_SMALL = "is too small"
"""Start of the reason that `PreparedForm.upscale` remedies."""


@dataclass(frozen=True, kw_only=True)
class PreparedForm:
    """Form of a prepared image."""

    size: int
    """Height and width in pixels."""
    channels: int
    """1 grey, 3 RGB, others of images with a condition alone, 1 to 8; 2 without one: points in the plane, stored as PNG
    grey and alpha."""
    upscale: bool
    """Enlarge smaller images instead of refusing them."""
    colour: Literal["srgb", "keep"] = "srgb"
    """Convert colour profiles to sRGB, or ignore them."""
    condition_channels: int = 0
    """Channels of the image that is given with each image, 1 to 8; 0 without."""
    condition_half: Literal["left", "right"] | None = None
    """The half of a file that is given, where the other half is the image; None: it has a file of its own."""
    max_pixels: int = MAX_PIXELS
    """Of an image that is decoded; larger ones are refused."""

    @property
    def extension(self) -> str:
        """Type of the encoded image."""
        if self.condition_channels:
            return PLANES_EXTENSION
        return "jpg" if self.size >= _JPEG_MIN_SIZE else "png"


class Prepared(NamedTuple):
    """A sample ready to be written, or the reason for its absence."""

    item: Item
    content: bytes
    error: str | None = None
    source_hash: int = 0
    """`hash_of` for the bytes that the source gave."""
    side: int = 0
    """Short side of the original in pixels; 0 if there is an error."""


def prepare_items(source: Source, items: list[Item], form: PreparedForm) -> list[Prepared]:
    """Read and encode some images of a source; unusable ones are reported, not raised."""
    return [_prepare_item(source, item, form) for item in items]


def _prepare_item(source: Source, item: Item, form: PreparedForm) -> Prepared:
    found = b""
    try:
        image = source.read(item)
        found = image + (condition := source.read_condition(item))
        if form.condition_channels:
            content, side = encode_pair(image, condition, form)
        else:
            content, side = encode_image(image, form), min(ImageFile(image).size)
        return Prepared(item, content, source_hash=hash_of(item, found), side=side)
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
    return encoded(square_image(content, form), form)


def encode_pair(content: bytes, condition: bytes, form: PreparedForm) -> tuple[bytes, int]:
    """Resize and crop an image and what is given with it alike, and encode their channels as planes without loss.

    Args:
        content: an image file, or an array in a .npy file, as `data.images.channels` reads them.
        condition: the same, of the same shape up to scale; it may be smaller, and is then enlarged. It has no effect
            with `form.condition_half`.
        form: form of the result.

    Returns:
        The planes, one below the other, and the short side of the file of the image in pixels.

    Raises:
        BadImageError: one of them cannot be used.
    """
    with refusals(content, form.max_pixels):
        if form.condition_half:
            file = ImageFile(content)
            side = min(file.size)
            halves = _halves(decoded(file, max(form.channels, form.condition_channels), form))
            given, image = halves if form.condition_half == "left" else halves[::-1]
            _check_size(image.size, form)
            planes, conditions = bands(image, form.channels), bands(given, form.condition_channels)
        else:
            planes = _planes(content, form.channels, form)
            side = min(planes[0].size)
            _check_size(planes[0].size, form)
            conditions = _planes_of_condition(condition, form)
    (W, H), (w, h) = planes[0].size, conditions[0].size
    # Rounding of half a pixel, of the image or of the condition, is no other shape.
    if abs(W * h - H * w) > max(W, H, w, h) / 2:
        raise BadImageError(f"its condition has another shape: {w}x{h}, the image has {W}x{H}")
    squares = [resized(plane, form) for plane in (*planes, *conditions)]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(square) for square in squares])).save(stream, "PNG")
    return stream.getvalue(), side


def square_condition(content: bytes, form: PreparedForm) -> npt.NDArray[np.uint8]:
    """What `encode_pair` makes of a condition alone, uint8 [C, H, W]; raises what it raises."""
    with refusals(content, form.max_pixels):
        planes = _planes(content, form.condition_channels, form)
        return np.stack([np.asarray(resized(plane, form)) for plane in planes])


def square_image(content: bytes, form: PreparedForm) -> Image.Image:
    """The image that `encode_image` encodes, of mode L or RGB; raises what it raises."""
    with refusals(content, form.max_pixels):
        file = ImageFile(content)
        _check_size(file.size, form)
        return resized(decoded(file, form.channels, form), form)


def whole_image(content: bytes, form: PreparedForm) -> Image.Image:
    """The whole image, of mode L or RGB, enlarged if a side is shorter than the wanted size; raises the same."""
    with refusals(content, form.max_pixels):
        image = decoded(ImageFile(content), form.channels, form)
        return scaled(image, enlarged(image.size, form.size))


def enlarged(size: tuple[int, int], least: int) -> tuple[int, int]:
    """Width and height, enlarged in proportion if one is less than `least`."""
    short = min(size)
    width, height = (max(least, round(side * least / short)) for side in size)
    return (width, height) if short < least else size


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image at another size, filtered as prepared images are."""
    if image.size == size:
        return image
    return image.resize(size, _filtering(image.width, size[0]))


@contextmanager
def refusals(content: bytes, max_pixels: int) -> Iterator[None]:
    """Inside, `content` is decoded; whatever is wrong with it becomes a BadImageError."""
    try:
        with warnings.catch_warnings():
            # PIL warns about sizes that `max_pixels` allows, and about unused metadata.
            warnings.simplefilter("ignore")
            yield
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(foreign_kind(content[:START_BYTES]) or "is no image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"has more than {max_pixels} pixels") from None
    except MemoryError:
        raise
    # On damaged input the decoders raise nearly anything, including TypeError and struct.error.
    except Exception as error:
        raise BadImageError(f"is damaged: {error}") from None


def decoded(file: ImageFile, channels: int, form: PreparedForm) -> Image.Image:
    """The whole image with a number of channels; 2: pixels and alpha as they are stored."""
    known = None if channels == 2 else channels
    return decode(file, known, max_pixels=form.max_pixels, keep_colours=form.colour == "keep")


def _check_size(size: tuple[int, int], form: PreparedForm) -> None:
    width, height = size
    if min(width, height) < form.size and not form.upscale:
        raise BadImageError(f"{TOO_SMALL}: {width}x{height}, the short side must be at least {form.size}")


def _halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right half."""
    width, height = image.size
    if width % 2:
        raise BadImageError(f"has {width}x{height} pixels, which cannot be split into two equal halves")
    return image.crop((0, 0, width // 2, height)), image.crop((width // 2, 0, width, height))


def _planes(content: bytes, channels: int, form: PreparedForm) -> list[Image.Image]:
    return read_planes(content, channels, max_pixels=form.max_pixels, keep_colours=form.colour == "keep")


def _planes_of_condition(condition: bytes, form: PreparedForm) -> list[Image.Image]:
    """The channels of the condition of an image."""
    try:
        with refusals(condition, form.max_pixels):
            return _planes(condition, form.condition_channels, form)
    except BadImageError as error:
        raise BadImageError(f"its condition {error}") from None


def resized(image: Image.Image, form: PreparedForm) -> Image.Image:
    """The square in the middle at the wanted size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    if side == form.size:
        return image.crop(square)
    return image.resize((form.size, form.size), _filtering(side, form.size), box=square)


def _filtering(side: int, new: int) -> Image.Resampling:
    # Lanczos widens with the reduction, so it averages over dropped pixels.
    return Image.Resampling.LANCZOS if side > new else Image.Resampling.BICUBIC


def encoded(image: Image.Image, form: PreparedForm) -> bytes:
    """A prepared image as the file that goes into a shard."""
    stream = io.BytesIO()
    if form.extension == "jpg":
        image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
