"""The domain in which images are diffused: their pixels, or the coefficients of a Haar wavelet transform.

In the Haar domain an image has four times the channels and half the height and width, so that a network of the same
widths costs about a quarter (WaveDiff, 2211.16152). The transform is linear, exact, and white noise stays white.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.shapes import Image, ImageForm

Domain = Literal["pixels", "haar"]


def haar(x: Image) -> Float[Tensor, "b 4*c h//2 w//2"]:
    """Coefficients LL, LH, HL, HH of each 2 x 2 block [p q; r s], each with the channels of the image.

    They are p + q + r + s, the lower minus the upper pixels, the right minus the left ones, and p + s minus q + r, all
    divided by 4: half of the orthonormal transform, so that pixels in [-1, 1] give coefficients in [-1, 1].
    """
    p, q, r, s = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    upper, lower, right_upper, right_lower = p + q, r + s, q - p, s - r
    bands = (upper + lower, lower - upper, right_upper + right_lower, right_lower - right_upper)
    return torch.cat(bands, dim=1) / 4


def inverse_haar(y: Image) -> Float[Tensor, "b c//4 2*h 2*w"]:
    """The image of Haar coefficients."""
    ll, lh, hl, hh = y.chunk(4, dim=1)
    upper, lower, right_upper, right_lower = ll - lh, ll + lh, hl - hh, hl + hh
    rows = [
        torch.stack([mean - right, mean + right], dim=-1).flatten(-2)
        for mean, right in ((upper, right_upper), (lower, right_lower))
    ]
    return torch.stack(rows, dim=-2).flatten(-3, -2)


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
