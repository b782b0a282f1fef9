"""Time until the first batch of a data set at a URL: `python -m tests.data.first_batch`.

A data set of real size is written to a temporary folder (one JPEG over and over), as version 1 of the format and as
version 2, and served by a server on loopback that answers late and slowly, as one far away does. Each round starts with
an empty cache. Not a test: it takes a minute, and its figures belong to the machine.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.index import FORMAT_NAME, FORMAT_VERSION, IndexDocument, load_index
from data.shards.writer import ShardSequence, write_index
from data.stream.pipeline import DataConfig, open_batches
from tests.data.servers import serve

_SIDE = 64


def _prepare(folder: Path, num_shards: int, shard_samples: int) -> None:
    """A data set whose shards differ in their keys and labels."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE]
    noise = np.random.default_rng(0).normal(0, 12, (_SIDE, _SIDE, 3))
    pixels = np.stack([x * 4, y * 4, (x * y) % 256], axis=-1) + noise
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    with ShardSequence(folder, shard_samples=shard_samples, shard_bytes=None) as shards:
        for number in range(num_shards * shard_samples):
            shards.write(f"{number:09d}-x", {"jpg": stream.getvalue(), "cls": str(number % 1000).encode()})
    document = IndexDocument(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        image_size=_SIDE,
        image_channels=3,
        num_classes=1000,
        class_names=[str(label) for label in range(1000)],
        source="made",
        source_fingerprint="0" * 64,
        options={},
        shards=shards.shards,
    )
    write_index(folder, document)


def _first_batch_s(url: str, workers: int, cache: str) -> float:
    index = load_index(url)
    config = DataConfig(path=url, image_size=_SIDE, num_classes=1000, loader_workers=workers, cache_directory=cache)
    numbers = {"seed": 0, "global_batch_size": 256, "share": (0, 256), "micro_batch_size": 256, "first_batch": 0}
    began = time.monotonic()
    with open_batches(config, index, **numbers) as batches:
        next(batches)
        return time.monotonic() - began


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.data.first_batch", description=__doc__)
    parser.add_argument("--shards", type=int, default=32, help="shards; a window has 32 (32)")
    parser.add_argument("--shard-samples", type=int, default=4096, help="images of a shard (4096)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (2)")
    parser.add_argument("--delay-ms", type=float, default=20, help="time before each answer (20)")
    parser.add_argument("--mb-per-s", type=float, default=100, help="bound on the transfer, all together (100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each version (5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddgan-first-batch-") as place:
        new = Path(place) / "new"
        new.mkdir()
        _prepare(new, options.shards, options.shard_samples)
        folders = {FORMAT_VERSION: new}
        document = json.loads((new / "index.json").read_text())
        if FORMAT_VERSION > 1:
            folders[1] = Path(place) / "old"
            folders[1].mkdir()
            for shard in document["shards"]:
                (folders[1] / shard["name"]).hardlink_to(new / shard["name"])
                del shard["offsets"]
            (folders[1] / "index.json").write_text(json.dumps({**document, "version": 1}))
        times: dict[int, list[float]] = {version: [] for version in sorted(folders)}
        requests: dict[int, int] = {}
        for _ in range(options.rounds):
            for version in times:
                with serve(folders[version]) as server, tempfile.TemporaryDirectory(prefix="ddgan-cache-") as cache:
                    server.delay_s, server.bytes_per_s = options.delay_ms / 1e3, options.mb_per_s * 1e6
                    times[version].append(_first_batch_s(server.url, options.workers, cache))
                    requests[version] = server.gets.total()
        num_bytes = sum(shard["num_bytes"] for shard in document["shards"])
        print(f"{options.shards} shards of {options.shard_samples} images, {num_bytes / 1e6:.0f} MB; {vars(options)}")
        for version, found in times.items():
            shown = ", ".join(f"{seconds:.2f}" for seconds in found)
            print(f"version {version}: median {statistics.median(found):.2f} s ({shown}), {requests[version]} requests")


if __name__ == "__main__":
    main()
