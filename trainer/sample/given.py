"""Given image files in the form of a run's images."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.images.decode import BadImageError, ImageFile
from data.prepare.encode import PreparedForm, square_image
from trainer.config.train_config import TrainConfig


def given_image(
    content: bytes, config: TrainConfig, *, factor: int = 1, max_pixels: int = PreparedForm.max_pixels
) -> Float[Tensor, "c h w"]:
    """An image file, cropped and resized as `data.prepare` does: float32 in [-1, 1].

    Args:
        content: of the file.
        config: of the run, whose size and channels the image gets.
        factor: side of the equal blocks that the image is made of, in pixels; it divides the size.
        max_pixels: of a file that is decoded.

    Raises:
        BadImageError: it is no image that can be used.
    """
    size, channels = config.data.image_size // factor, config.image_form.channels
    form = PreparedForm(size=size, channels=1 if channels == 1 else 3, upscale=True, max_pixels=max_pixels)
    pixels = np.array(square_image(content, form)).reshape(size, size, channels)
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def opaque_pixels(content: bytes, config: TrainConfig) -> Float[Tensor, "1 h w"]:
    """1 where an image file, which `given_image` takes, is opaque, otherwise 0.

    Raises:
        BadImageError: it is opaque everywhere.
    """
    image = ImageFile(content).decode(keep_alpha=True)
    alpha, size = image.convert("RGBA").getchannel("A"), config.data.image_size
    if alpha.getextrema()[0] == 255:
        raise BadImageError("has no transparent parts to fill")
    side = min(alpha.size)
    left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
    pixels = np.array(alpha.resize((size, size), box=(left, top, left + side, top + side)))
    return torch.from_numpy(pixels == 255)[None].float()
