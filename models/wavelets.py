"""The domain in which images are diffused: their pixels, or the coefficients of a Haar wavelet transform.

In the Haar domain an image has four times the channels and half the height and width, so that a network of the same
widths costs about a quarter (WaveDiff, 2211.16152). The transform is linear, exact, and white noise stays white.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.layers import is_channels_last, join
from models.shapes import DoubleFeatures, Features, Image, ImageForm

Domain = Literal["pixels", "haar"]


def haar(x: Image) -> Float[Tensor, "b 4*c h//2 w//2"]:
    """Coefficients LL, LH, HL, HH of each 2 x 2 block [p q; r s], each with the channels of the image.

    They are p + q + r + s, the lower minus the upper pixels, the right minus the left ones, and p + s minus q + r, all
    divided by 4: half of the orthonormal transform, so that pixels in [-1, 1] give coefficients in [-1, 1].
    """
    return join(sums_of_blocks(x)) / 4


def sums_of_blocks(x: Image) -> list[Float[Tensor, "b c h//2 w//2"]]:
    """LL, LH, HL and HH of each block without their factor, each with the channels of the image."""
    last = is_channels_last(x)
    B, C, H, W = x.shape
    inner = C if last else 1  # values of neighbours lie so far apart in memory
    left, right = _in_memory(x, last).reshape(-1, 2, inner).unbind(1)
    bands = []
    for columns in (left + right, right - left):
        upper, lower = columns.view(-1, 2, W // 2 * inner).unbind(1)
        bands.append((upper + lower, lower - upper))
    (ll, lh), (hl, hh) = bands
    return [_as_image(band, (B, C, H // 2, W // 2), last) for band in (ll, lh, hl, hh)]


def inverse_haar(y: Image) -> Float[Tensor, "b c//4 2*h 2*w"]:
    """The image of Haar coefficients."""
    return from_bands(*y.chunk(4, dim=1))


def from_bands(ll: Features, lh: Features, hl: Features, hh: Features) -> DoubleFeatures:
    """The image of Haar coefficients, which are given one by one."""
    halves = ((ll - lh, ll + lh), (hl - hh, hl + hh))
    last = is_channels_last(halves[0][0])
    B, C, h, w = ll.shape
    inner = C if last else 1
    mean, right = (
        torch.stack([_in_memory(row, last).reshape(-1, w * inner) for row in rows], dim=1).view(-1, inner)
        for rows in halves
    )
    return _as_image(torch.stack((mean - right, mean + right), dim=1), (B, C, 2 * h, 2 * w), last)


def _in_memory(x: Tensor, last: bool) -> Tensor:
    """An image with its dimensions in the order of memory, in which halving and its gradient keep the layout."""
    return x.permute(0, 2, 3, 1) if last else x


def _as_image(values: Tensor, shape: tuple[int, int, int, int], last: bool) -> Tensor:
    """The image of values in the order of memory."""
    B, C, H, W = shape
    return values.view(B, H, W, C).permute(0, 3, 1, 2) if last else values.view(shape)


def from_pixels(x: Image, domain: Domain) -> Float[Tensor, "b c_y h_y w_y"]:
    """An image in a domain."""
    return haar(x) if domain == "haar" else x


def to_pixels(y: Image, domain: Domain) -> Float[Tensor, "b c_x h_x w_x"]:
    """The pixels of an image in a domain; those of generated Haar coefficients may lie beyond [-1, 1]."""
    return inverse_haar(y) if domain == "haar" else y


def form_in(form: ImageForm, domain: Domain) -> ImageForm:
    """Size and channels in a domain of images whose pixels have `form`.

    Raises:
        ValueError: The images cannot be transformed.
    """
    if domain == "pixels":
        return form
    if form.size % 2:
        raise ValueError(
            f"data.domain is haar, which halves the image, but data.image_size is {form.size}: prepare images of an "
            "even size, or set data.domain to pixels"
        )
    return replace(
        form, size=form.size // 2, channels=4 * form.channels, condition_channels=4 * form.condition_channels
    )
