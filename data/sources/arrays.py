"""Sources of small images in arrays; the embedded ones: digits, and points of a mixture of 25 Gaussians."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.sources.source import BaseSource, FormDefaults, Item, SourceError, pixel_file

Split = Literal["train", "test"]
DIGIT_NAMES = tuple("0123456789")
NUM_POINTS = 25_000
MODE_LEVELS = (27.5, 77.5, 127.5, 177.5, 227.5)
"""Centres of the modes along each axis."""
MODE_DEVIATION_LEVELS = 2.5
"""Standard deviation of each mode along each axis: a twentieth of the distance between neighbours."""
_TAG = 0x706F696E7473  # "points": keeps these draws apart from any other use of the same seed


class LabelledPixels(NamedTuple):
    """All images of a source."""

    pixels: npt.NDArray[np.uint8]
    """[N, size, size, channels]."""
    labels: npt.NDArray[np.int64]
    """[N]."""

    @property
    def digest(self) -> str:
        """Hash of all of it, hexadecimal."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ArraySource(BaseSource):
    """Images in arrays, which each process loads on its first read."""

    description: str
    load: Callable[[], LabelledPixels]

    @cached_property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """[N, size, size, channels]."""
        return self.load().pixels

    def read(self, item: Item) -> bytes:
        """The image as a PGM or PPM file."""
        pixels = self.pixels[int(item.name)]
        return pixel_file(pixels.tobytes(), size=len(pixels), channels=self.defaults.channels)


def array_source(
    description: str,
    load: Callable[[], LabelledPixels],
    *,
    class_names: tuple[str, ...],
    defaults: FormDefaults,
) -> ArraySource:
    """A source of arrays.

    Args:
        description: kind and name.
        load: reads the arrays again in each process; picklable and small.
        class_names: name of each label; labels are 0 .. len(class_names) - 1.
        defaults: form of the images, with the channels of the arrays.
    """
    loaded = load()
    pixels, labels = loaded
    num_bytes = pixels[:1].nbytes
    items = tuple(Item(f"{number:05d}", num_bytes, label) for number, label in enumerate(labels.tolist()))
    return ArraySource(
        description=description,
        load=load,
        items=items,
        class_names=class_names,
        defaults=defaults,
        state=loaded.digest,
    )


def digits_source() -> ArraySource:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 grey, ten classes.

    Raises:
        SourceError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("source digits: scikit-learn is missing; install it with: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    # Grey values are 0 .. 16.
    pixels = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    # Send the arrays to the workers, so that they need not import scikit-learn.
    load = partial(LabelledPixels, pixels, labels.astype(np.int64))
    return array_source("digits", load, class_names=DIGIT_NAMES, defaults=FormDefaults(16, 1, True))


@dataclass(frozen=True, kw_only=True)
class PointsSource(BaseSource):
    """Points in the plane, for experiments with a known answer. Labels are the modes, row by row.

    A point is an image of one pixel with two channels, so that it is handled like any image. Its coordinates are pixel
    levels of 0 to 255. An item's name has them: `number-x-y`.
    """

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
