"""A grid of images as one picture."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from data.images.shown import pictures_of

GAP_PIXELS = 2
GAP_LEVEL = 128
"""Grey level of the gaps, visible next to black and white images."""
_NAME_PIXELS = (11, 28)
"""Smallest and largest font size of the names of rows."""
_NAME_LETTERS = 24
"""Longer names are cut."""


def lay_out(
    images: npt.NDArray[np.uint8], *, columns: int, min_width: int, row_names: Sequence[str] = ()
) -> npt.NDArray[np.uint8]:
    """Lay out images row by row with grey gaps between them; small ones are enlarged by a whole factor.

    Args:
        images: uint8 [N, H, W, C] in reading order, N > 0; of any number of channels, see `pictures_of`.
        columns: images in a row.
        min_width: pixels that a full row has at least, gaps and names aside.
        row_names: written to the left of the rows; empty: no names.

    Returns:
        uint8 [grid height, grid width, 1 or 3].
    """
    images = pictures_of(images)
    num_images, height, width, channels = images.shape
    rows = -(-num_images // columns)
    scale = max(1, -(-min_width // (columns * width)))
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    grid = np.full((rows * step_y - GAP_PIXELS, columns * step_x - GAP_PIXELS, channels), GAP_LEVEL, dtype=np.uint8)
    for i, image in enumerate(enlarged):
        y, x = i // columns * step_y, i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image
    return np.concatenate([_margin(row_names, grid, step_y), grid], axis=1) if row_names else grid


def _margin(names: Sequence[str], grid: npt.NDArray[np.uint8], step_y: int) -> npt.NDArray[np.uint8]:
    """The names, right-aligned, each at the middle of its row of `grid`."""
    smallest, largest = _NAME_PIXELS
    font = ImageFont.load_default(size=min(largest, max(smallest, step_y // 2)))
    cut = [name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 3] + "..." for name in names]
    width = round(max(font.getlength(name) for name in cut)) + 4 * GAP_PIXELS
    picture = Image.new("L", (width, len(grid)), 255)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(cut):
        draw.text((width - 2 * GAP_PIXELS, row * step_y + step_y // 2), name, fill=0, font=font, anchor="rm")
    return np.asarray(picture)[:, :, None].repeat(grid.shape[2], axis=2)
