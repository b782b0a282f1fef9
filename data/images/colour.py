"""Converts pixels from the colours of an ICC profile to sRGB."""

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
"""Profiles of devices and colour spaces, bytes 12 to 15 of an ICC profile."""
_SAME_LEVELS = 2
"""Profiles whose colours differ from sRGB by no more than this are sRGB, rounded in another way."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image of mode L, RGB or CMYK.

    Args:
        image: the pixels.
        profile: their ICC profile.

    Returns:
        An RGB image; the same image if the profile is sRGB, damaged, or for other modes.
    """
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    if profile[12:16] not in _CLASSES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    # A damaged profile raises nearly anything. It is metadata, so the pixels are used as they are.
    except Exception:
        return None
    return None if mode != "CMYK" and _is_identity(transform, mode) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 256 if mode == "L" else 17).round().astype(np.uint8)
    colours = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    sample = Image.fromarray(colours)
    difference = np.asarray(transform.apply(sample)).astype(int) - np.asarray(sample.convert("RGB"))
    return bool(np.abs(difference).max() <= _SAME_LEVELS)
