"""TIFF files of any number of channels: read in every layout, and refused where pixels would be missing or guessed."""

import io
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.images import tiff
from data.images.decode import BadImageError
from data.images.tiff import read_channels
from data.prepare.encode import PreparedForm, square_condition

MANY = 10**6
PLAIN = np.random.default_rng(0).integers(0, 2**16, (19, 23, 8), dtype=np.uint16)


def written(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **{"photometric": "minisblack", **options})
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", ["interleaved", "planes", "pages", "deflate", "tiles", "predictor"])
def test_channels_in_every_layout_are_the_same(channels, dtype, layout):
    wide = PLAIN[..., :channels]
    pixels = (wide >> 8).astype(np.uint8) if dtype == "u1" else wide
    byteorder = ">" if dtype == ">u2" else "<"
    planes = pixels.transpose(2, 0, 1)
    if channels == 1:
        planes = pixels = pixels[..., 0]
    config = {} if channels == 1 else {"planarconfig": "contig"}
    content = {
        "interleaved": lambda: written(pixels, byteorder=byteorder, rowsperstrip=5, **config),
        "planes": lambda: written(
            planes, byteorder=byteorder, **({} if channels == 1 else {"planarconfig": "separate"})
        ),
        "pages": lambda: written(planes, byteorder=byteorder, metadata=None),
        "deflate": lambda: written(pixels, byteorder=byteorder, compression="zlib", **config),
        "tiles": lambda: written(pixels, byteorder=byteorder, tile=(16, 16), **config),
        "predictor": lambda: written(pixels, byteorder=byteorder, compression="zlib", predictor=2, **config),
    }[layout]()
    found = read_channels(content, max_pixels=MANY)
    assert found.dtype == np.uint8
    assert np.array_equal(found, PLAIN[..., :channels] >> 8)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (written(np.zeros((9, 9, 5), np.float32), planarconfig="contig"), "has 32 bits of type float32; allowed are"),
        (written(np.zeros((9, 9), np.uint8), photometric="miniswhite"), "is a TIFF of the colours MINISWHITE"),
        (written(np.zeros((2, 3, 9, 9), np.uint8), metadata={"axes": "TCYX"}), r"has the axes TCYX of the sizes \["),
        (written(np.zeros((2000, 3000), np.uint8)), "has 3000x2000 pixels, more than 1000000"),
        (written(PLAIN, planarconfig="contig", extratags=[(274, "H", 1, 6, True)]), "is a TIFF that is not upright"),
        (written(PLAIN, planarconfig="contig")[:-50], "is damaged: pixels are missing"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(content, told):
    with pytest.raises(BadImageError, match=told):
        read_channels(content, max_pixels=MANY)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_strips_that_are_too_short_are_no_pixels(tmp_path, options):
    file = tmp_path / "a.tif"
    file.write_bytes(written(PLAIN, planarconfig="contig", rowsperstrip=5, **options))
    with tifffile.TiffFile(file, mode="r+") as opened:
        tag = opened.pages[0].aspage().tags["StripByteCounts"]
        tag.overwrite((*tag.value[:1], 20, *tag.value[2:]))
    form = PreparedForm(size=16, channels=3, upscale=True, condition_channels=8)
    with pytest.raises(BadImageError, match="is damaged"):
        square_condition(file.read_bytes(), form)


def test_a_compression_that_needs_more_libraries_is_named():
    stream = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 2), np.uint8)).save(stream, "TIFF", compression="tiff_lzw")
    with pytest.raises(BadImageError, match="is a TIFF compressed by LZW; store it uncompressed or with Deflate"):
        read_channels(stream.getvalue(), max_pixels=MANY)


def test_without_tifffile_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(tiff, "find_spec", lambda _: None)
    with pytest.raises(BadImageError, match=r"which is not installed: pip install '\.\[tiff\]'"):
        read_channels(written(PLAIN, planarconfig="contig"), max_pixels=MANY)
