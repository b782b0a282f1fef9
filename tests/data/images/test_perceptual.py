"""The hash keeps what changes with size and encoding out, and the search finds what comparing each with each finds."""

import io

import numpy as np
from PIL import Image

from data.images.perceptual import NEAR_BITS, near_pairs, perceptual_hash


def picture(seed: int) -> Image.Image:
    """Smooth shapes with noise, 120 x 100."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[0:100, 0:120]
    waves = sum(np.sin(x * a + y * b + c) for a, b, c in draws.uniform(0, 0.3, (6, 3)))
    pixels = 128 + 25 * waves + draws.normal(0, 4, (100, 120))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def bits(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_picture_stays_near_to_itself_and_far_from_others() -> None:
    pictures = [picture(seed) for seed in range(12)]
    for image in pictures:
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "JPEG", quality=40)
        for changed in (Image.open(stream), image.resize((60, 50)), image.point(lambda level: level * 0.8)):
            assert bits(image, changed) <= NEAR_BITS
    assert min(bits(one, other) for i, one in enumerate(pictures) for other in pictures[:i]) > 2 * NEAR_BITS


def test_search_finds_all_near_pairs_and_no_others() -> None:
    draws = np.random.default_rng(0)
    first = np.unique(draws.integers(0, 2**64, 300, dtype=np.uint64))
    flips = [
        np.bitwise_or.reduce(np.left_shift(np.uint64(1), draws.choice(64, count, replace=False).astype(np.uint64)))
        for count in draws.integers(0, 8, 300)
    ]
    second = np.unique(draws.choice(first, 300) ^ np.array(flips, dtype=np.uint64))
    distances = np.bitwise_count(first[:, None] ^ second[None, :])
    expected = np.argwhere(distances <= NEAR_BITS)
    assert 100 < len(expected) < 300
    assert np.array_equal(near_pairs(first, second), expected)
    assert near_pairs(first, second[:0]).shape == (0, 2)
