"""Points in the plane, drawn from a mixture of 25 Gaussians, for experiments with a known answer.

A point is an image of one pixel with two channels, so that it is handled like any image. Its coordinates are pixel
levels of 0 to 255.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.sources.source import BaseSource, FormDefaults, Item

NUM_POINTS = 25_000
MODE_LEVELS = (27.5, 77.5, 127.5, 177.5, 227.5)
"""Centres of the modes along each axis."""
MODE_DEVIATION_LEVELS = 2.5
"""Standard deviation of each mode along each axis: a twentieth of the distance between neighbours."""
_TAG = 0x706F696E7473  # "points": keeps these draws apart from any other use of the same seed


@dataclass(frozen=True, kw_only=True)
class PointsSource(BaseSource):
    """Points; an item's name has its coordinates: `number-x-y`. Labels are the modes, row by row."""

    description: str

    def read(self, item: Item) -> bytes:
        """A PNG file of one pixel: grey is x, alpha is y."""
        point = np.array([[[int(level) for level in item.name.split("-")[1:]]]], dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(point).save(stream, "PNG")
        return stream.getvalue()


def gaussians25_source(*, num_points: int | None, seed: int) -> PointsSource:
    """A grid of 5 x 5 isotropic Gaussians with equal weights.

    Args:
        num_points: None: 25,000. The first points do not depend on it.
        seed: determines the points, 0 .. 2**64 - 1.
    """
    points, modes = draw_points(num_points or NUM_POINTS, seed=seed)
    items = tuple(
        Item(f"{number:06d}-{x}-{y}", 2, mode)
        for number, ((x, y), mode) in enumerate(zip(points.tolist(), modes.tolist(), strict=True))
    )
    names = tuple(f"{x:g}, {y:g}" for x in MODE_LEVELS for y in MODE_LEVELS)
    return PointsSource(description="gaussians25", items=items, class_names=names, defaults=FormDefaults(1, 2, False))


def draw_points(length: int, *, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Points [length, 2] and their modes [length], from raw 64-bit outputs, which numpy keeps stable."""
    generator = np.random.Philox(key=np.array([seed, _TAG], dtype=np.uint64))
    raw = np.asarray(generator.random_raw(3 * length), dtype=np.uint64).reshape(length, 3)
    modes = (raw[:, 0] % np.uint64(25)).astype(np.int64)
    # Box-Muller: two normals from two uniforms in (0, 1].
    uniform = ((raw[:, 1:] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0])), 2.0 * np.pi * uniform[:, 1]
    normals = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    centres = np.array(MODE_LEVELS)[np.stack([modes // 5, modes % 5], axis=1)]
    return np.rint(centres + MODE_DEVIATION_LEVELS * normals).clip(0, 255).astype(np.uint8), modes
