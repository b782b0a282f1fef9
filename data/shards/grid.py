"""A grid of images as one picture."""

import numpy as np
import numpy.typing as npt

GAP_PIXELS = 2
GAP_LEVEL = 128
"""Grey level of the gaps, visible next to black and white images."""


def lay_out(images: npt.NDArray[np.uint8], *, columns: int, min_width: int) -> npt.NDArray[np.uint8]:
    """Lay out images row by row with grey gaps between them; small ones are enlarged by a whole factor.

    Args:
        images: uint8 [N, H, W, C] in reading order, N > 0.
        columns: images in a row.
        min_width: pixels that a full row has at least, gaps aside.

    Returns:
        uint8 [grid height, grid width, C].
    """
    num_images, height, width, channels = images.shape
    rows = -(-num_images // columns)
    scale = max(1, -(-min_width // (columns * width)))
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    grid = np.full((rows * step_y - GAP_PIXELS, columns * step_x - GAP_PIXELS, channels), GAP_LEVEL, dtype=np.uint8)
    for i, image in enumerate(enlarged):
        y, x = i // columns * step_y, i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image
    return grid
