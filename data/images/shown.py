"""How images of any number of channels are shown: grey and RGB as they are, others as their channels side by side."""

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX_CHANNELS = 8
"""Of an image."""
PICTURE_CHANNELS = (1, 3)
"""Of grey and of RGB. Every image file can hold them; other numbers of channels have no agreed colours."""


def pictures_of(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images as grey or RGB pictures: uint8 [N, H, W, 1 or 3] as they are, others [N, H, C W, 1].

    Args:
        images: uint8 [N, H, W, C].
    """
    N, H, W, C = images.shape
    return images if C in PICTURE_CHANNELS else images.transpose(0, 1, 3, 2).reshape(N, H, C * W, 1)


def tiles_of(num_channels: int) -> int:
    """How many times as wide as an image its picture is."""
    return 1 if num_channels in PICTURE_CHANNELS else num_channels


def mean_of_channels(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """An image [H, W, C] as a grey one of the same size, by which images are compared."""
    return Image.fromarray(pixels.mean(axis=2).round().astype(np.uint8))
