"""What a model that translates is given: the conditions of a prepared data set of pairs, or of image files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.images.shown import PICTURE_CHANNELS
from data.prepare.encode import PreparedForm, square_condition
from data.shards.files import shard_files
from data.shards.index import load_index
from data.shards.offsets import read_offsets
from data.shards.reader import OpenShards
from data.storage.errors import UserError
from data.stream.pipeline import decode_or_replace
from models.diffusion import Diffusion
from models.shapes import Uint8Image
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import Loaded, draw_batch, images_at_once, sample_images, to_condition
from trainer.sample.fidelity import Fidelity

GRID_COLUMNS = 8
_OPEN_SHARDS = 16


class PreparedPairs:
    """The pairs of a prepared data set, by number in its order. Use a `with` statement.

    Attributes:
        index: of the data set.
    """

    def __init__(self, path: str | Path, config: TrainConfig) -> None:
        """Open it.

        Args:
            path: folder or URL.
            config: of the run, whose conditions it must have.

        Raises:
            UserError: its images or conditions have another form.
            DataError: it cannot be read.
        """
        self.index = load_index(path)
        found = (self.index.image_size, self.index.image_channels, self.index.condition_channels)
        data = config.data
        wanted = (data.image_size, data.image_channels, data.condition_channels)
        if found != wanted:
            names = "image_size {}, image_channels {}, condition_channels {}"
            raise UserError(
                f"{self.index.shown_location} has {names.format(*found)}, but the run {names.format(*wanted)}: give a "
                "data set of pairs of the form that the run was trained on"
            )
        self._files = shard_files(self.index, cache_directory=data.cache_directory, cache_gb=data.cache_gb)
        self._readers = OpenShards(self._files.open, self.index.shards, _OPEN_SHARDS)
        self._ends = np.cumsum([shard.num_samples for shard in self.index.shards])

    def __len__(self) -> int:
        return self.index.num_samples

    def read(self, numbers: Sequence[int]) -> tuple[Uint8Image, Uint8Image, list[int | None]]:
        """Images, conditions and labels of some pairs; numbers beyond the last one begin anew.

        As in training, a damaged pair is replaced by the next good one of its shard.

        Raises:
            DataError: a shard cannot be read, or has no good pair.
        """
        pixels = np.empty((len(numbers), *self.index.pixels_shape), dtype=np.uint8)
        labels: list[int | None] = []
        for out, number in zip(pixels, numbers, strict=True):
            place = number % len(self)
            shard = int(np.searchsorted(self._ends, place, side="right"))
            sample = place - int(self._ends[shard]) + self.index.shards[shard].num_samples
            label, _, _ = decode_or_replace(out, self._readers, self.index, shard, sample)
            labels.append(None if self.index.num_classes is None else label)
        planes, C = torch.from_numpy(pixels).permute(0, 3, 1, 2), self.index.image_channels
        return planes[:, :C].contiguous(), planes[:, C:].contiguous(), labels

    @property
    def labels(self) -> list[int]:
        """Of all pairs."""
        tables = (read_offsets(shard, self._files.open) for shard in self.index.shards)
        return [label for table in tables for label in (table[:, 2].astype(np.int64) - 1).tolist()]

    def __call__(self, numbers: Sequence[int]) -> Uint8Image:
        """The conditions alone, as `sample_batches` takes them."""
        return self.read(numbers)[1]

    def __enter__(self) -> "PreparedPairs":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._readers.close()
        self._files.close()


@contextmanager
def given_pairs(config: TrainConfig, path: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Arguments by which `sample_batches` draws image i for pair i of a data set; none for a model without conditions.

    Args:
        config: of the run.
        path: of the data set; None: that of the run.
    """
    if not config.data.condition_channels:
        yield {}
        return
    with PreparedPairs(path or config.data.path, config) as pairs:
        yield {"conditions": pairs, "classes": pairs.labels if config.data.num_classes else None}


def compared(
    batches: Iterable[Uint8Image],
    given: Mapping[str, Any],
    fidelity: Fidelity,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Uint8Image]:
    """The batches that `sample_batches` draws; those of a model that translates are compared with the images of pairs.

    Args:
        batches: rank, rank + world_size, ... of all.
        given: what `given_pairs` gives.
        fidelity: takes the comparison in.
        batch_size: images of all batches but the last one.
        rank, world_size: which batches these are.
    """
    pairs: PreparedPairs | None = given.get("conditions")
    for number, batch in zip(count(rank, world_size), batches, strict=False):
        if pairs is not None:
            first = number * batch_size
            images, conditions, _ = pairs.read(range(first, first + len(batch)))
            fidelity.add(images, batch[:, None], conditions)
        yield batch


def draw_translations(generator: nn.Module, diffusion: Diffusion, config: TrainConfig, *, num: int) -> Uint8Image:
    """Rows of `GRID_COLUMNS` pictures for the first pairs of the run's data set: what is given, the image, results.

    Args:
        generator: in evaluation mode.
        diffusion: tables on its device.
        config: of the run.
        num: pictures at most; one row at least.
    """
    of_each = GRID_COLUMNS - 2
    with PreparedPairs(config.data.path, config) as pairs:
        images, conditions, labels = pairs.read(range(min(len(pairs), max(1, num // GRID_COLUMNS))))
    rows = len(images)
    results = sample_images(
        generator,
        diffusion,
        config,
        num=rows * of_each,
        seed=0,
        classes=[labels[i // of_each] or 0 for i in range(rows * of_each)] if config.data.num_classes else None,
        conditions=lambda numbers: conditions[[i // of_each % rows for i in numbers]],
    )
    shown = as_pictures(conditions, images.shape[1])
    return torch.cat([shown[:, None], images[:, None], results.unflatten(0, (rows, of_each))], dim=1).flatten(0, 1)


def as_pictures(conditions: Uint8Image, channels: int) -> Uint8Image:
    """Conditions next to images of a number of channels, as images of as many.

    With 1 or 3: the same, grey for each, the mean of RGB, or the first channel. With others: the first ones, and black
    for those that are missing.
    """
    if conditions.shape[1] == channels:
        return conditions
    if channels not in PICTURE_CHANNELS:
        shown = conditions[:, :channels]
        return torch.cat([shown, shown.new_zeros(len(shown), channels - shown.shape[1], *shown.shape[2:])], dim=1)
    if conditions.shape[1] == 3:
        return conditions.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    return conditions[:, :1].expand(-1, channels, -1, -1)


def read_condition(content: bytes, config: TrainConfig, *, max_pixels: int = PreparedForm.max_pixels) -> Uint8Image:
    """What is given in an image file or a .npy file, uint8 [1, K, H, W], cropped and resized as `data.prepare` does.

    Args:
        content: of the file.
        config: of the run.
        max_pixels: of a file that is decoded.

    Raises:
        BadImageError: it cannot be used.
    """
    size, channels = config.data.image_size, config.data.condition_channels
    form = PreparedForm(size=size, channels=3, upscale=True, max_pixels=max_pixels, condition_channels=channels)
    return torch.from_numpy(square_condition(content, form))[None]


def translations(
    loaded: Loaded, inputs: Iterable[tuple[Uint8Image, int | None]], *, num: int, seed: int, guidance: float = 1.0
) -> Iterator[Uint8Image]:
    """The results of each input, uint8 [num, C, H, W]: each a function of weights, seed, input and its number.

    Args:
        loaded: from `load_run`.
        inputs: what is given, uint8 [1, K, H, W], and the class of its results.
        num: results of each input.
        seed: of all noise.
        guidance: as in `sample_batches`.
    """
    generator, diffusion, config = loaded
    device, size = next(generator.parameters()).device, images_at_once(config.data.image_size)
    jobs = ((*given, number) for given in inputs for number in range(num))
    results: list[Tensor] = []
    for batch in iter(lambda: list(islice(jobs, size)), []):
        # Always as many at once: another batch size changes the order of float sums.
        conditions, labels, numbers = zip(*batch, *[batch[-1]] * (size - len(batch)), strict=True)
        images = draw_batch(
            generator,
            diffusion,
            config,
            seed,
            torch.tensor(numbers, device=device),
            torch.tensor(labels, device=device) if config.data.num_classes else None,
            to_condition(torch.cat(conditions), config, device),
            guidance=guidance,
        )
        for number, image in zip(numbers[: len(batch)], images.cpu(), strict=False):
            results.append(image)
            if number == num - 1:
                yield torch.stack(results)
                results = []
