"""One image file -> one prepared sample: square, of the wanted size, encoded. Runs in the workers of `data.prepare`."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from data.sources.source import Item, Source

_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
"""Decoders that may see a file: some others run programs."""


_MAX_PIXELS = 200_000_000


_JPEG_MIN_SIZE = 64
"""Below this, PNG: JPEG's 8 px blocks show, and hardly anything is saved."""


_JPEG_QUALITY = 95


TOO_SMALL = "is too small"
"""How the reason begins for which `ImageForm.upscale` is the remedy."""


_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its Exif orientation."""


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """What a prepared image looks like."""

    size: int
    """Height and width in pixels."""
    channels: Literal[1, 2, 3]
    """1 grey, 3 RGB; 2 for points of the plane, which PNG calls grey and alpha."""
    upscale: bool
    """Enlarge smaller images rather than refuse them."""

    @property
    def extension(self) -> str:
        """Type of the encoded image."""
        return "jpg" if self.size >= _JPEG_MIN_SIZE else "png"


class Prepared(NamedTuple):
    """A sample ready to be written, or the reason why there is none."""

    item: Item
    content: bytes
    error: str | None = None


def prepare_items(source: Source, items: list[Item], form: ImageForm) -> list[Prepared]:
    """Read and encode some images of a source; one that cannot be used is reported, not raised."""
    prepared: list[Prepared] = []
    for item in items:
        try:
            prepared.append(Prepared(item, encode_image(source.read(item), form)))
        except BadImageError as error:
            prepared.append(Prepared(item, b"", str(error)))
        except OSError as error:
            prepared.append(Prepared(item, b"", f"cannot be read: {error.strerror or error}"))
    return prepared


def encode_image(content: bytes, form: ImageForm) -> bytes:
    """Resize the short side to the wanted size with antialiasing, crop the centre, encode.

    Args:
        content: an image file in one of the known formats.
        form: what the result looks like.

    Raises:
        BadImageError: unreadable, truncated, too small, or of a kind that has no plain grey or RGB form.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns of sizes that _MAX_PIXELS allows, and of metadata that is not used here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return _encode(_resize(_load(image, form), form), form)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("is no image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"has more than {_MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    # On damaged input the decoders raise nearly anything, TypeError and struct.error included.
    except Exception as error:
        raise BadImageError(f"is damaged: {error}") from None


def _load(image: Image.Image, form: ImageForm) -> Image.Image:
    width, height = image.size
    if width * height > _MAX_PIXELS:
        raise BadImageError(f"has {width}x{height} pixels, more than {_MAX_PIXELS}")
    if min(width, height) < form.size and not form.upscale:
        raise BadImageError(f"{TOO_SMALL}: {width}x{height}, the short side must be at least {form.size}")
    # Not `image.draft`: a JPEG decoded at a fraction of its size is faster, but differs from the filtered whole image
    # by up to 2.5 grey levels in the mean (photographs, to 64 px), as much as the encoding at the end.
    image.load()
    # Not `ImageOps.exif_transpose`: it writes the Exif block anew, and fails if a good photograph's has a wrong type.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):
        # PIL would clip 16-bit grey at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImageError(f"has pixels of mode {image.mode}, which have no agreed range; convert it to 8 bits")
    if form.channels == 2:
        return image
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("L" if form.channels == 1 else "RGB")


def _resize(image: Image.Image, form: ImageForm) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    if side == form.size:
        return image.crop(square)
    # Lanczos widens with the reduction, so that it averages over what it drops.
    filtering = Image.Resampling.LANCZOS if side > form.size else Image.Resampling.BICUBIC
    return image.resize((form.size, form.size), filtering, box=square)


def _encode(image: Image.Image, form: ImageForm) -> bytes:
    stream = io.BytesIO()
    if form.extension == "jpg":
        image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
