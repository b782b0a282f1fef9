"""How long each part of a preparation takes one CPU: `python -m data.bench prepare SOURCE --size N`.

One process does every part for the same images, one part after the other. The plan divides by the number of CPUs; it
holds while the storage and the network carry what that many of them read and write.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL import Image
from rich.console import Console
from rich.table import Table

from data.images.decode import BadImageError, ImageFile
from data.prepare.encode import PreparedForm, decoded, encoded, refusals, resized
from data.sets.arguments import Parser
from data.shards.writer import ShardSequence
from data.sources.find import open_source
from data.storage.arguments import whole_number
from data.storage.location import DataError
from data.storage.paths import location_argument
from data.storage.surroundings import processor
from data.storage.writable import WritableStorage

_T = TypeVar("_T")
_R = TypeVar("_R")
_TEST_NAME = "ddgan-bench-upload"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a preparation."""

    name: str
    ms: float
    """Time of an image on one CPU."""
    num_bytes: float | None = None
    """Bytes of an image that it reads or writes."""


def time_preparing(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = Parser(
        prog="python -m data.bench prepare",
        description="How long reading, decoding, resizing, encoding and writing take one CPU, and a plan for many.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="as for data.prepare")
    parser.add_argument("--size", type=whole_number(4), required=True, help="height and width in pixels")
    parser.add_argument("--images", type=whole_number(1), default=200, help="images of the source to take (200)")
    parser.add_argument(
        "--upload", type=location_argument, metavar="URL", help="write a shard there, and remove it again"
    )
    parser.add_argument("--plan", type=whole_number(1), default=10**8, metavar="N", help="images of the plan (10^8)")
    parser.add_argument("--cpus", type=whole_number(1), default=64, metavar="N", help="CPUs of the plan (64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    parts, num_images = _measured(options.source, options.size, options.images, options.upload)
    _show(parts, num_images, options.plan, options.cpus, as_json=options.json)
    return 0


def _measured(name: str, size: int, num_images: int, url: str | None) -> tuple[list[Part], int]:
    source = open_source(name, max_images=num_images)
    form = PreparedForm(size=size, channels=source.defaults.channels, upscale=True)
    read_ms, contents = _timed(source.read, source.items)
    good = [content for content in contents if _is_good(content, form)]
    if not good:
        raise DataError(f"none of the first {num_images} images of {source.description} can be decoded")
    decode_ms, images = _timed(lambda content: decoded(ImageFile(content), form.channels, form), good)
    resize_ms, squares = _timed(lambda image: resized(image, form), images)
    encode_ms, files = _timed(lambda square: encoded(square, form), squares)
    read_bytes, written_bytes = (sum(map(len, some)) / len(some) for some in (good, files))
    with tempfile.TemporaryDirectory(prefix="ddgan-bench-") as folder:
        began = time.perf_counter()
        with ShardSequence(Path(folder), shard_samples=None, shard_bytes=None) as shards:
            for number, file in enumerate(files):
                shards.write(f"{number:09d}", {form.extension: file})
            shard = shards.finish()
        assert shard is not None
        parts = [
            Part(name="read", ms=read_ms, num_bytes=read_bytes),
            Part(name="decode", ms=decode_ms),
            Part(name="resize", ms=resize_ms),
            Part(name="encode", ms=encode_ms),
            Part(name="write shard, with hash", ms=_ms(began, files), num_bytes=written_bytes),
        ]
        if url is not None:
            parts.append(
                Part(name="upload", ms=_upload_ms(url, Path(folder, shard.name), files), num_bytes=written_bytes)
            )
    return parts, len(good)


def _is_good(content: bytes, form: PreparedForm) -> bool:
    with contextlib.suppress(BadImageError), refusals(content, form.max_pixels):
        decoded(ImageFile(content), form.channels, form)
        return True
    return False


def _upload_ms(url: str, file: Path, images: Sequence[bytes]) -> float:
    storage = WritableStorage(url)

    def chunks() -> Iterator[memoryview]:
        yield memoryview(file.read_bytes())

    storage.files()  # connects
    began = time.perf_counter()
    storage.write(_TEST_NAME, chunks())
    ms = _ms(began, images)
    storage.remove([_TEST_NAME])
    return ms


def _timed(work: Callable[[_T], _R], values: Sequence[_T]) -> tuple[float, list[_R]]:
    """Milliseconds for each value, and the results. The first few are done before, to warm up."""
    for value in islice(values, 3):
        with contextlib.suppress(OSError, BadImageError):
            work(value)
    began = time.perf_counter()
    results = [work(value) for value in values]
    return _ms(began, values), results


def _ms(began: float, values: Sequence[object]) -> float:
    return (time.perf_counter() - began) * 1000 / len(values)


def _show(parts: Sequence[Part], num_images: int, planned: int, cpus: int, *, as_json: bool) -> None:
    total_ms = sum(part.ms for part in parts)
    cpu_hours = total_ms / 1000 * planned / 3600
    if as_json:
        content = {
            "machine": processor(),
            "images": num_images,
            "parts": [vars(part) for part in parts],
            "images_per_s": 1000 / total_ms,
            "plan": {"images": planned, "cpus": cpus, "cpu_hours": cpu_hours, "hours": cpu_hours / cpus},
        }
        print(json.dumps(content))  # noqa: T201
        return
    console = Console(highlight=False)
    console.print(f"{num_images} images, one CPU of {processor()}, Pillow {Image.__version__}", soft_wrap=True)
    table = Table("part, longest first", "ms an image", "share", "bytes an image")
    for part in sorted(parts, key=lambda part: -part.ms):
        table.add_row(
            part.name,
            f"{part.ms:.3f}",
            f"{part.ms / total_ms:.0%}",
            "" if part.num_bytes is None else f"{part.num_bytes:,.0f}",
        )
    console.print(table)
    read, written = (sum(part.num_bytes or 0 for part in parts if part.name.startswith(x)) for x in ("read", "write"))
    rate = cpus * 1000 / total_ms
    console.print(
        f"{1000 / total_ms:,.0f} images/s on one CPU\n{planned:,} images: {cpu_hours:,.0f} CPU hours, with {cpus} CPUs "
        f"{cpu_hours / cpus:,.1f} h; they then read {rate * read / 1e6:,.0f} MB/s and write "
        f"{rate * written / 1e6:,.0f} MB/s, {planned * read / 1e12:,.1f} and {planned * written / 1e12:,.1f} TB in all",
        soft_wrap=True,
    )
