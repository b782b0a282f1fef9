"""The Haar domain against the transform's matrix in float64."""

import math

import numpy as np
import pytest
import torch

from models.shapes import ImageForm
from models.wavelets import form_in, from_pixels, haar, inverse_haar, to_pixels

X = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_coefficients_are_half_of_the_orthonormal_transform():
    low, high = np.array([1.0, 1.0]) / math.sqrt(2), np.array([-1.0, 1.0]) / math.sqrt(2)
    blocks = X.numpy().reshape(2, 3, 3, 2, 4, 2)
    expected = [
        np.einsum("bcyixj,i,j->bcyx", blocks, vertical, horizontal) / 2
        for vertical, horizontal in ((low, low), (high, low), (low, high), (high, high))
    ]
    np.testing.assert_allclose(haar(X).numpy(), np.concatenate(expected, axis=1), atol=1e-15)


def test_inverse_is_exact_and_squares_sum_to_a_quarter():
    assert (inverse_haar(haar(X)) - X).abs().max() < 1e-15
    assert (inverse_haar(haar(X.float())) - X.float()).abs().max() < 1e-6
    assert haar(X).square().sum().item() == pytest.approx(X.square().sum().item() / 4)
    assert haar(X).abs().max() <= 1


def test_all_grey_levels_return():
    levels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    returned = inverse_haar(haar(levels.float() / 127.5 - 1))
    assert torch.equal(((returned + 1) * 127.5).round().long(), levels)


def test_pixels_are_the_other_domain():
    assert from_pixels(X, "pixels") is X and to_pixels(X, "pixels") is X
    assert torch.equal(from_pixels(X, "haar"), haar(X))
    assert torch.equal(to_pixels(haar(X), "haar"), inverse_haar(haar(X)))


def test_form_in_the_domain():
    assert form_in(ImageForm(256, 3, 10), "haar") == ImageForm(128, 12, 10)
    assert form_in(ImageForm(7, 3), "pixels") == ImageForm(7, 3)
    with pytest.raises(ValueError, match=r"data\.image_size is 7: prepare images of an even size"):
        form_in(ImageForm(7, 3), "haar")
