"""TIFF files of any number of channels, as microscopes, satellites and scanners write them; PIL knows up to 4.

Channels may be interleaved, in planes of their own, or pages. The only file that imports tifffile.
"""

import io
import logging
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.images.decode import BadImageError

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _UPRIGHT = 274, 1
_MINISBLACK, _RGB = 1, 2
"""Kinds of colours whose numbers grow with brightness."""


def can_use_tifffile() -> bool:
    """Whether the extra `tiff` is installed."""
    return find_spec("tifffile") is not None


def write_channels(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write channels [C, H, W] as planes of one image, compressed by Deflate.

    Raises:
        OSError: the file cannot be written.
    """
    import tifffile

    with path.open("wb") as file:
        tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="separate", compression="zlib")


def read_channels(content: bytes, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """The channels of a TIFF file; those of 16 bits keep their upper 8. Damaged files may raise any exception.

    Args:
        content: of the file.
        max_pixels: of the image; the header is checked before anything is decoded.

    Returns:
        uint8 [H, W, C].

    Raises:
        BadImageError: it is no image of one size with channels of 8 or 16 bits, or tifffile is not installed.
    """
    if not can_use_tifffile():
        raise BadImageError("is a TIFF that only tifffile reads, which is not installed: pip install '.[tiff]'")
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it makes of damaged metadata
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        H, W, C = _sizes(series.axes, series.shape)
        if max_pixels < H * W:
            raise BadImageError(f"has {W}x{H} pixels, more than {max_pixels}")
        pages = [page for page in series.pages if page is not None]
        first = pages[0].aspage()
        if first.photometric not in (_MINISBLACK, _RGB):
            raise BadImageError(f"is a TIFF of the colours {tifffile.PHOTOMETRIC(first.photometric).name}; store grey")
        orientation = first.tags.get(_ORIENTATION)
        if orientation is not None and orientation.value != _UPRIGHT:
            raise BadImageError("is a TIFF that is not upright; turn it")
        if first.bitspersample not in (8, 16) or first.dtype not in (np.uint8, np.uint16):
            raise BadImageError(f"has {first.bitspersample} bits of type {first.dtype}; allowed are uint8 and uint16")
        for page in pages:
            ends = [start + num for start, num in zip(page.dataoffsets, page.databytecounts, strict=True)]
            if not ends or 0 in page.databytecounts or max(ends) > len(content):
                raise BadImageError("is damaged: pixels are missing")
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            kind = tifffile.COMPRESSION(first.compression).name
            raise BadImageError(f"is a TIFF compressed by {kind}; store it uncompressed or with Deflate") from None
    if array.size != math.prod(series.shape):
        raise BadImageError("is damaged: pixels are missing")
    if C == 1:
        array = array.reshape(H, W, 1)
    elif series.axes.index("Y") > 0:
        array = np.moveaxis(array, 0, -1)
    return array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)


def _sizes(axes: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of an array whose axes have these letters; Y and X are those of an image."""
    sizes = dict(zip(axes, shape, strict=True))
    others = [letter for letter in axes if letter not in "YX"]
    if len(sizes) != len(axes) or "YX" not in axes or len(others) > 1:
        raise BadImageError(f"has the axes {axes} of the sizes {list(shape)}; expected is one image with channels")
    return sizes["Y"], sizes["X"], sizes[others[0]] if others else 1
