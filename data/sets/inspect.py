"""`python -m data.prepare inspect DIR`: summary and contact sheet of a prepared data set."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from data.images.shown import pictures_of, tiles_of
from data.sets.near import describe_near, draw_near, find_near
from data.sets.origin import original_sides
from data.sets.terminal import progress_bar
from data.sets.work_folder import OutputError
from data.shards.decode import decode_into
from data.shards.files import shard_files
from data.shards.grid import lay_out
from data.shards.index import FORMAT_NAME, ShardIndex
from data.shards.reader import ShardReader
from data.sources.source import shown_name
from data.storage.files import replaced

_SHEET_IMAGES = 64
_SHEET_IMAGE_PIXELS = 256
"""Larger images are reduced to this height and width: no viewer opens a sheet of 64 images of 1024 px."""
_SHEET_WIDTH_PIXELS = 512
"""Small images are enlarged until the sheet is at least this wide."""
_LISTED_CLASSES = 18
_CACHE_GB = 50.0
_BAR_WIDTH = 30


def inspect(
    index: ShardIndex, sheet: str | None, console: Console, *, against: ShardIndex | None = None, workers: int = 0
) -> str:
    """Summarize a data set and write its contact sheet.

    Args:
        index: the data set.
        sheet: file of the sheet, replaced if it exists; None: `contact-sheet-NAME.png` in the current folder.
        console: where the progress bar goes.
        against: a data set in which near-duplicates are looked for; they go to a second sheet, `-pairs.png`.
        workers: processes that compare.

    Returns:
        The summary, some lines of text.

    Raises:
        OutputError: the sheet cannot be written there.
        DataError: a shard or an image of the sheet is damaged.
    """
    file = _sheet_file(index, sheet)
    images, labels = _read(index, console)
    _write(file, contact_sheet(images))
    lines = [*_summary(index, labels), f"sheet         {file} ({len(images)} images)"]
    if against is not None:
        pairs = find_near(index, against, workers, console)
        lines += describe_near(index, against, pairs)
        pairs_file = file.with_name(f"{file.stem}-pairs.png")
        if pairs:
            with _explained(pairs_file):
                shown = draw_near(index, against, pairs, pairs_file)
            lines.append(f"pairs         {pairs_file} ({shown} pairs)")
    return "\n".join(lines)


def sheet_samples(num_samples: int) -> list[int]:
    """Sample numbers on the sheet, evenly spread over the data set."""
    shown = min(_SHEET_IMAGES, num_samples)
    return [(2 * i + 1) * num_samples // (2 * shown) for i in range(shown)]


def contact_sheet(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A grid about as wide as it is high: uint8 [sheet height, sheet width, 1 or 3].

    Args:
        images: pictures, uint8 [N, H, W, 1 or 3], N > 0.
    """
    _, height, width, _ = images.shape
    columns = math.isqrt((len(images) - 1) * height // width) + 1
    return lay_out(images, columns=columns, min_width=_SHEET_WIDTH_PIXELS)


def _sheet_file(index: ShardIndex, sheet: str | None) -> Path:
    name = index.shown_location.rstrip("/").rpartition("/")[2]
    file = Path(sheet or f"contact-sheet-{name or 'root'}.png").absolute()
    if file.suffix.lower() != ".png":
        raise OutputError(f"--sheet {sheet}: the sheet is a PNG; give a name that ends in .png")
    if file.is_dir():
        raise OutputError(f"--sheet {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise OutputError(f"--sheet {file}: there is no folder {file.parent}; make it, or choose another")
    return file


def _read(index: ShardIndex, console: Console) -> tuple[npt.NDArray[np.uint8], Counter[int]]:
    """The pictures of the sheet [N, H, W, 1 or 3], and the count of each label (-1 for none)."""
    wanted = sheet_samples(index.num_samples)
    pixels = np.empty(index.pixels_shape, dtype=np.uint8)
    tiles = tiles_of(index.image_channels) + (tiles_of(index.condition_channels) if index.condition_channels else 0)
    side = min(index.image_size, _SHEET_IMAGE_PIXELS // max(1, tiles // 2))  # 32 px for 16 tiles, the most
    images: list[npt.NDArray[np.uint8]] = []
    labels: Counter[int] = Counter()
    first, shown = 0, 0
    with (
        contextlib.closing(shard_files(index, cache_directory=None, cache_gb=_CACHE_GB)) as files,
        progress_bar(console) as progress,
    ):
        for shard in progress.track(index.shards, description="reading shards"):
            end = first + shard.num_samples
            # Without classes, read only shards with shown images.
            if index.num_classes is not None or (shown < len(wanted) and wanted[shown] < end):
                with contextlib.closing(ShardReader(files.open, shard)) as reader:
                    values, counts = np.unique(reader.labels, return_counts=True)
                    labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
                    while shown < len(wanted) and wanted[shown] < end:
                        decode_into(pixels, reader.read(wanted[shown] - first))
                        images.append(_shown(pixels, index, side))
                        shown += 1
            first = end
    return np.stack(images), labels


def _shown(pixels: npt.NDArray[np.uint8], index: ShardIndex, side: int) -> npt.NDArray[np.uint8]:
    """The picture of a sample on the sheet: its image, to the right of its condition if it has one."""
    C = index.image_channels
    image = pictures_of(_reduced(pixels[..., :C], side)[None])[0]
    if not index.condition_channels:
        return image
    condition = pictures_of(_reduced(pixels[..., C:], side)[None])[0]
    channels = max(x.shape[2] for x in (condition, image))
    parts = [np.broadcast_to(x, (*x.shape[:2], channels)) for x in (condition, image)]
    return np.concatenate(parts, axis=1)


def _reduced(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A copy of an image [H, W, C], resized."""
    if len(pixels) == side:
        return pixels.copy()
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(pixels.shape[2])]
    return np.stack([np.asarray(plane.resize((side, side), Image.Resampling.LANCZOS)) for plane in planes], axis=2)


def _picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _write(file: Path, sheet: npt.NDArray[np.uint8]) -> None:
    with _explained(file), replaced(file) as draft:
        _picture(sheet).save(draft, "PNG")


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"--sheet {file} cannot be written: {error.strerror or error}; choose another") from None


def _summary(index: ShardIndex, labels: Counter[int]) -> list[str]:
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    samples = [shard.num_samples for shard in index.shards]
    of_each = f"{samples[0]} images each" if len(set(samples)) == 1 else f"{min(samples)} to {max(samples)} images"
    options = ", ".join(f"{name} {value}" for name, value in index.options.items() if value is not None)
    return [
        f"location      {index.shown_location}",
        f"source        {shown_name(index.source)}",
        f"options       {shown_name(options)}",
        f"images        {index.num_samples}",
        f"form          {index.image_size}x{index.image_size}, {_form(index)}",
        *([f"condition     {given} channel{'s' * (given > 1)}"] if (given := index.condition_channels) else []),
        *_class_lines(index, labels),
        *_side_lines(index),
        f"shards        {len(samples)} of {of_each}",
        f"bytes         {num_bytes}, {num_bytes / index.num_samples:.0f} per image with its tar header",
        f"format        {FORMAT_NAME} version {index.version}",
        f"digest        {index.digest}",
    ]


def _form(index: ShardIndex) -> str:
    if index.has_points:
        return "points of the plane"
    return {1: "grey", 3: "RGB"}.get(index.image_channels, f"{index.image_channels} channels")


def _side_lines(index: ShardIndex) -> list[str]:
    """A histogram of the short sides of the source's images, if they were recorded."""
    sides = original_sides(index.location)
    if not sides:
        return []
    ordered = np.repeat(list(sides), list(sides.values()))
    ordered.sort()
    count = len(ordered)
    of_all = "" if count == index.num_samples else f" of {count} images"
    lines = [f"originals     short side {ordered[0]} to {ordered[-1]} px, median {ordered[count // 2]}{of_all}"]
    edge = 2 ** int(math.log2(ordered[0]))
    while edge <= ordered[-1]:
        within = int(np.count_nonzero((ordered >= edge) & (ordered < 2 * edge)))
        bar = "#" * math.ceil(_BAR_WIDTH * within / count)
        lines.append(f"  {edge:>6} to {2 * edge - 1:<6} {within:>9} ({within / count:6.1%})  {bar}".rstrip())
        edge *= 2
    return lines


def _class_lines(index: ShardIndex, labels: Counter[int]) -> list[str]:
    if index.class_names is None:
        return ["classes       none"]
    known = {label: labels.pop(label, 0) for label in range(len(index.class_names))}
    lines = [f"classes       {len(known)}"]
    for label in list(known)[:_LISTED_CLASSES]:
        share = known[label] / index.num_samples
        lines.append(f"  {label:>6}  {shown_name(index.class_names[label])}: {known[label]} ({share:.1%})")
    if rest := list(known.values())[_LISTED_CLASSES:]:
        lines.append(f"  and {len(rest)} more with {min(rest)} to {max(rest)} images each")
    if labels:
        # The remaining labels are not in the index.
        lines.append(f"  wrong or no label: {labels.total()}; python -m data.prepare verify names them")
    return lines
