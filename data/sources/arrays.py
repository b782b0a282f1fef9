"""Sources of small images in arrays; the digits of scikit-learn."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data.sources.source import BaseSource, FormDefaults, Item, SourceError, pixel_file

Split = Literal["train", "test"]
DIGIT_NAMES = tuple("0123456789")


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
