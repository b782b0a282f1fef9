"""What images of any number of channels look like."""

import numpy as np
import pytest

from data.images.shown import mean_of_channels, pictures_of, tiles_of
from data.shards.grid import lay_out


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_rgb_are_shown_as_they_are(channels: int) -> None:
    images = noise(2, 4, 4, channels)
    assert pictures_of(images) is images
    assert tiles_of(channels) == 1


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_other_channels_are_shown_side_by_side(channels: int) -> None:
    images = noise(2, 4, 6, channels)
    pictures = pictures_of(images)
    assert pictures.shape == (2, 4, 6 * tiles_of(channels), 1)
    for c in range(channels):
        assert np.array_equal(pictures[:, :, 6 * c : 6 * (c + 1), 0], images[..., c])


def test_a_grid_of_images_of_five_channels_is_grey() -> None:
    images = noise(3, 4, 4, 5)
    grid = lay_out(images, columns=1, min_width=0)
    assert grid.shape == (3 * 4 + 2 * 2, 20, 1)
    assert np.array_equal(grid[6:10, 8:12, 0], images[1, ..., 2])


def test_images_are_compared_by_the_mean_of_their_channels() -> None:
    pixels = noise(4, 6, 5)
    assert np.array_equal(np.asarray(mean_of_channels(pixels)), np.rint(pixels.astype(float).sum(2) / 5))
