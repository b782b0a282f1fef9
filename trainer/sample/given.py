"""Given image files in the form of a run's images."""

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.images.decode import BadImageError, ImageFile
from data.prepare.encode import PreparedForm, enlarged, scaled, square_image, whole_image
from trainer.config.train_config import TrainConfig

MAX_TILED_PIXELS = 2**24
"""Of an image that is edited in tiles: its random numbers take 100 bytes a pixel while they are drawn."""


def given_image(
    content: bytes,
    config: TrainConfig,
    *,
    factor: int = 1,
    whole: bool = False,
    max_pixels: int = PreparedForm.max_pixels,
) -> Float[Tensor, "c h w"]:
    """An image file, cropped and resized as `data.prepare` does: float32 in [-1, 1].

    Args:
        content: of the file.
        config: of the run, whose size and channels the image gets.
        factor: side of the equal blocks that the image is made of, in pixels; it divides the size.
        whole: keep its shape and its size, or `factor` times its size. It is enlarged if it is smaller than the run's,
            and has its last row or column cut off where it cannot be transformed to wavelet coefficients.
        max_pixels: of a file that is decoded.

    Raises:
        BadImageError: it is no image that can be used.
    """
    size, channels = config.data.image_size // factor, config.image_form.channels
    form = PreparedForm(size=size, channels=1 if channels == 1 else 3, upscale=True, max_pixels=max_pixels)
    image = whole_image(content, form) if whole else square_image(content, form)
    if whole and image.width * image.height * factor**2 > MAX_TILED_PIXELS:
        raise BadImageError(f"would have more than {MAX_TILED_PIXELS} pixels, too many to be edited in tiles")
    pixels = np.array(image).reshape(image.height, image.width, channels)
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return _cut(torch.from_numpy(pixels).permute(2, 0, 1), config).float() / 127.5 - 1


def _cut(pixels: Tensor, config: TrainConfig) -> Tensor:
    """Pixels [C, H, W] without what is more than whole coefficients."""
    step = config.data.image_size // config.network_form.size
    _, H, W = pixels.shape
    return pixels[:, : H - H % step, : W - W % step]


def known_of_mask(mask: Image.Image, config: TrainConfig, size: tuple[int, int]) -> Float[Tensor, "1 h w"]:
    """1 where a mask of mode L is light, for an image file of a width and height that `given_image` takes whole."""
    pixels = np.array(scaled(mask, enlarged(size, config.data.image_size)))
    return _cut(torch.from_numpy(pixels >= 128)[None], config).float()


def opaque_pixels(content: bytes, config: TrainConfig, *, whole: bool = False) -> Float[Tensor, "1 h w"]:
    """1 where an image file, which `given_image` takes, is opaque, otherwise 0.

    Args:
        content: of the file.
        config: of the run.
        whole: as in `given_image`.

    Raises:
        BadImageError: it is opaque everywhere.
    """
    image = ImageFile(content).decode(keep_alpha=True)
    alpha, size = image.convert("RGBA").getchannel("A"), config.data.image_size
    if alpha.getextrema()[0] == 255:
        raise BadImageError("has no transparent parts to fill")
    if whole:
        pixels = np.array(scaled(alpha, enlarged(alpha.size, size)))
    else:
        side = min(alpha.size)
        left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
        pixels = np.array(alpha.resize((size, size), box=(left, top, left + side, top + side)))
    return _cut(torch.from_numpy(pixels == 255)[None], config).float()
