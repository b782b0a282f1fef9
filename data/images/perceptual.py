"""Near-duplicates of images by a perceptual hash of 64 bits: equal pictures stay close when they are resized or encoded
again. Crops, mirrored images and pictures that are recoloured are not found."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

NEAR_BITS = 4
"""Hashes that differ in at most so many of their 64 bits belong to near-duplicates."""
_HASH_BITS = 64
_CANDIDATES = 2**22
"""Pairs of hashes compared at a time: 100 MB."""
Hashes = npt.NDArray[np.uint64]


def perceptual_hash(image: Image.Image) -> int:
    """The hash of an image of any size: the signs of the lowest 8 x 8 frequencies of its 32 x 32 grey version.

    Source: pHash, as ImageHash computes it; https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html

    Args:
        image: of any mode that PIL converts to L.

    Returns:
        64 bits.
    """
    # Imported here: it brings scipy.
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes())


def near_pairs(first: Hashes, second: Hashes) -> npt.NDArray[np.int64]:
    """All pairs of hashes that differ in at most `NEAR_BITS` bits, without comparing each with each.

    Of `NEAR_BITS` + 1 parts of two such hashes at least one is equal, so only hashes with an equal part are compared.

    Args:
        first: [N], without repeats.
        second: [M], without repeats.

    Returns:
        [P, 2]: places in `first` and `second`, each pair once, in ascending order.
    """
    edges = [part * _HASH_BITS // (NEAR_BITS + 1) for part in range(NEAR_BITS + 2)]
    found = [np.zeros((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        found += _with_equal_part(first, second, np.uint64(low), np.uint64(2 ** (high - low) - 1))
    return np.unique(np.concatenate(found), axis=0)


def _with_equal_part(
    first: Hashes, second: Hashes, shift: np.uint64, mask: np.uint64
) -> Iterator[npt.NDArray[np.int64]]:
    """The near pairs among those that agree in the bits of `mask`, after a shift to the right."""
    parts = (second >> shift) & mask
    order = np.argsort(parts, kind="stable")
    wanted = (first >> shift) & mask
    begins = np.searchsorted(parts[order], wanted, side="left")
    counts = np.searchsorted(parts[order], wanted, side="right") - begins
    totals = np.cumsum(counts)
    start = 0
    while start < len(first):
        # At least one row, then as many as the bound allows.
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + _CANDIDATES, side="right")))
        some = counts[start:stop]
        left = np.repeat(np.arange(start, stop), some)
        places = np.arange(len(left)) - np.repeat(np.cumsum(some) - some, some)
        right = order[np.repeat(begins[start:stop], some) + places]
        near = np.bitwise_count(first[left] ^ second[right]) <= NEAR_BITS
        yield np.stack([left[near], right[near]], axis=1)
        start = stop
