"""How fast a prepared data set is read: `python -m data.bench DIR`; or prepared: `python -m data.bench prepare SOURCE`.

Prints images per second of a bare decoder loop, of this project's reader with several numbers of loader processes, of
plain WebDataset and of a torch Dataset over image files. All read the same images and take turns within one run.
Compare the ratios; the rates depend on the machine. The images come from the page cache, as in a warm run.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset

from data.prepare.rates import time_preparing
from data.shards.decode import decode_into
from data.shards.files import shard_files
from data.shards.index import ShardIndex, load_index
from data.shards.offsets import IMAGE_EXTENSIONS
from data.shards.reader import BadSampleError, EncodedSample, samples_in_order
from data.storage.arguments import whole_number
from data.storage.errors import as_command
from data.storage.location import DataError
from data.storage.paths import location_argument
from data.storage.surroundings import processor
from data.stream.pipeline import DataConfig, open_batches
from data.stream.shuffle_quality import ShuffleQuality, shuffle_quality

_SAMPLES = 1024
"""Images for the bare loop and the folder of files; more do not change the rate."""
Step = Callable[[], int]
"""Reads a batch and returns its number of images."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Result of one way of reading."""

    reader: str
    """Its name."""
    loader_workers: int
    """Processes in addition to the consumer; 0: the consumer does everything."""
    images_per_s: float
    """Median over rounds."""
    private_mb: float | None
    """Largest private memory of a loader process, in 10^6 bytes; None if not measured."""
    taker_us: float
    """CPU time of the process that takes the batches, in 10^-6 s per image; median over rounds."""
    loaders_us: float | None
    """The same for all loader processes together; None if not measured."""


class ImageFiles(Dataset[torch.Tensor]):
    """Image files decoded by PIL, like an ImageFolder without transforms."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self._files[number]) as image:
            pixels = np.array(image)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


class _Bench:
    """The ways of reading one data set. Each method opens one and registers its cleanup in `stack`."""

    def __init__(self, index: ShardIndex, micro_batch_size: int, stack: ExitStack) -> None:
        self._index = index
        self._micro_batch_size = micro_batch_size
        self._stack = stack
        self._samples = _some_samples(index)

    def bare(self) -> Step:
        """Only the decoder, on bytes in memory."""
        decode = simplejpeg.decode_jpeg if self._samples[0].extension == "jpg" else _decode_with_pil
        contents = cycle(sample.content for sample in self._samples)

        def step() -> int:
            for _ in range(self._micro_batch_size):
                decode(next(contents))
            return self._micro_batch_size

        return step

    def ours(self, loader_workers: int, pin_memory: bool) -> tuple[Step, tuple[int, ...]]:
        """This project's reader, and its process ids."""
        size = self._micro_batch_size
        batches = open_batches(
            DataConfig(
                path=self._index.location,
                image_size=self._index.image_size,
                image_channels=self._index.image_channels,
                condition_channels=self._index.condition_channels,
                loader_workers=loader_workers,
            ),
            self._index,
            seed=0,
            global_batch_size=size,
            share=(0, size),
            micro_batch_size=size,
            first_batch=0,
            pin_memory=pin_memory,
        )
        self._stack.enter_context(closing(batches))
        return lambda: len(next(batches).images), batches.process_ids

    def webdataset(self) -> Step:
        """WebDataset's own reader, decoder and batches, in one loader process, without a shuffle."""
        urls = [str(self._index.directory / shard.name) for shard in self._index.shards]
        dataset: Any = WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
        dataset = dataset.to_tuple(";".join(IMAGE_EXTENSIONS)).batched(self._micro_batch_size).repeat()
        batches = self._looped(DataLoader(dataset, batch_size=None, num_workers=1))
        return lambda: len(next(batches)[0])

    def files(self) -> Step:
        """A torch Dataset over image files, shuffled, in one loader process."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ddgan-bench-")))
        files = [folder / f"{number:05d}.{sample.extension}" for number, sample in enumerate(self._samples)]
        for file, sample in zip(files, self._samples, strict=True):
            file.write_bytes(sample.content)
        loader = DataLoader(ImageFiles(files), batch_size=self._micro_batch_size, shuffle=True, num_workers=1)
        batches = self._looped(loader)
        return lambda: len(next(batches))

    def _looped(self, loader: "DataLoader[torch.Tensor]") -> Iterator[torch.Tensor]:
        def forever() -> Generator[torch.Tensor]:
            while True:
                yield from loader

        batches = forever()
        self._stack.callback(batches.close)
        return batches


def _decode_with_pil(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return np.asarray(image)


def _some_samples(index: ShardIndex) -> list[EncodedSample]:
    """The first decodable images of the data set."""
    pixels = np.empty(index.pixels_shape, dtype=np.uint8)
    good: list[EncodedSample] = []
    with closing(shard_files(index, cache_directory=None, cache_gb=DataConfig.cache_gb)) as files:
        for sample in islice(samples_in_order(index.shards, files.open), _SAMPLES):
            with suppress(BadSampleError):
                decode_into(pixels, sample)
                good.append(sample)
    if not good:
        raise DataError(f"none of the first {_SAMPLES} images of {index.shown_location} can be decoded")
    return good


class _Round(NamedTuple):
    """One round of one way of reading."""

    images_per_s: float
    taker_us: float
    loaders_us: float | None


def _timed(step: Step, seconds: float, loaders: Sequence[psutil.Process] = ()) -> _Round:
    """Run one round; CPU times are per image."""

    def processor_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in loaders)

    images, taker_s, loaders_s, began = 0, time.process_time(), processor_s(), time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        images += step()
    taker_us = (time.process_time() - taker_s) / images * 1e6
    return _Round(images / elapsed, taker_us, (processor_s() - loaders_s) / images * 1e6 if loaders else None)


def time_reading(
    index: ShardIndex, *, loader_workers: Sequence[int], micro_batch_size: int, seconds: float, rounds: int
) -> list[Rate]:
    """Time every way of reading.

    Args:
        index: a local prepared data set.
        loader_workers: numbers of loader processes to try with this project's reader.
        micro_batch_size: images per batch.
        seconds: length of a round; a warm-up of a quarter of that precedes it.
        rounds: rounds of each way. They take turns, so that a slowdown affects all ways.
    """
    pin_memory = torch.cuda.is_available()
    ours = f"this reader{', pinned' if pin_memory else ''}"
    ways: list[tuple[str, int]] = [("bare decoder", 0), *((ours, n) for n in loader_workers)]
    ways += [("WebDataset", 1), ("image files", 1)]
    found: dict[tuple[str, int], list[_Round]] = {way: [] for way in ways}
    private: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for way in ways:
            # One at a time: idle loader processes of another way would still fill their queues.
            with ExitStack() as stack:
                bench = _Bench(index, micro_batch_size, stack)
                pids: tuple[int, ...] = ()
                match way:
                    case ("bare decoder", _):
                        step = bench.bare()
                    case ("WebDataset", _):
                        step = bench.webdataset()
                    case ("image files", _):
                        step = bench.files()
                    case (_, workers):
                        step, pids = bench.ours(workers, pin_memory)
                loaders = [psutil.Process(pid) for pid in pids]
                _timed(step, seconds / 4)
                found[way].append(_timed(step, seconds, loaders))
                if loaders:
                    private[way] = max(loader.memory_full_info().uss for loader in loaders) / 1e6
    return [_summary(way, rounds, private.get(way)) for way, rounds in found.items()]


def _summary(way: tuple[str, int], rounds: Sequence[_Round], private_mb: float | None) -> Rate:
    loaders_us = [found.loaders_us for found in rounds if found.loaders_us is not None]
    return Rate(
        reader=way[0],
        loader_workers=way[1],
        images_per_s=statistics.median(found.images_per_s for found in rounds),
        private_mb=private_mb,
        taker_us=statistics.median(found.taker_us for found in rounds),
        loaders_us=statistics.median(loaders_us) if loaders_us else None,
    )


def _machine() -> str:
    """Describe the hardware."""
    return f"{processor()}, torch {torch.__version__}"


def _shuffle(index: ShardIndex, batch_size: int) -> ShuffleQuality | None:
    """Quality of the reader's order at the default window; None if no shard has two samples."""
    sizes = [shard.num_samples for shard in index.shards]
    if max(sizes) < 2:
        return None
    return shuffle_quality(sizes, window_shards=DataConfig.shuffle_window_shards, batch_size=batch_size)


def _show(index: ShardIndex, rates: Sequence[Rate], shuffle: ShuffleQuality | None) -> None:
    console = Console(highlight=False)
    console.print(
        f"{index.shown_location}: {index.num_samples} images "
        f"{index.image_size}x{index.image_size}x{index.image_channels}; {_machine()}",
        soft_wrap=True,
    )
    # 80 columns, including "pinned".
    processor = "CPU us an\nimage: taker\n+ loaders"
    table = Table("reader", "loaders", "images/s", "of bare\ndecoder", "private\nMB each", processor)
    for rate in rates:
        table.add_row(
            rate.reader,
            str(rate.loader_workers),
            f"{rate.images_per_s:,.0f}",
            f"{rate.images_per_s / rates[0].images_per_s:.2f}",
            "" if rate.private_mb is None else f"{rate.private_mb:,.0f}",
            f"{rate.taker_us:,.0f}" + ("" if rate.loaders_us is None else f" + {rate.loaders_us:,.0f}"),
        )
    console.print(table)
    if shuffle:
        console.print(
            f"shuffle at the default window: neighbours on disk come {shuffle.mean_distance:,.0f} samples apart, in a "
            f"full permutation {shuffle.full_permutation:,.0f} (ratio {shuffle.ratio:.2f}); in one batch come "
            f"{shuffle.same_batch:.2%} of them, in a full permutation {shuffle.same_batch_full_permutation:.2%}",
            soft_wrap=True,
        )


@as_command(name="data.bench")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 1: failed; 2: wrong arguments or data."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["prepare"]:
        return time_preparing(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m data.bench",
        description=(__doc__ or "").partition("\n")[0],
        epilog="A folder called prepare is given as ./prepare.",
    )
    parser.add_argument("directory", type=location_argument, metavar="DIR", help="folder of a prepared data set")
    parser.add_argument(
        "--workers", type=whole_number(0), nargs="+", default=[0, 1, 2], help="numbers of loader processes"
    )
    parser.add_argument("--micro-batch", type=whole_number(1), default=64, help="images of a batch (64)")
    parser.add_argument("--seconds", type=whole_number(1), default=4, help="length of a round (4)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="rounds of each way of reading (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    index = load_index(options.directory)
    if index.is_remote:
        raise DataError(
            f"{index.shown_location} is no local folder: the network would be measured; copy the data set first"
        )
    rates = time_reading(
        index,
        loader_workers=options.workers,
        micro_batch_size=options.micro_batch,
        seconds=options.seconds,
        rounds=options.rounds,
    )
    shuffle = _shuffle(index, options.micro_batch)
    if options.json:
        shuffled = shuffle and {**asdict(shuffle), "ratio": shuffle.ratio}
        print(json.dumps({"machine": _machine(), "rates": [asdict(rate) for rate in rates], "shuffle": shuffled}))
    else:
        _show(index, rates, shuffle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
