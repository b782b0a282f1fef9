"""Edit images with a trained run: `python -m trainer.edit --run DIR --image FILE --stroke --out FOLDER`.

Every way of editing noises an image and denoises it again. --stroke turns a drawing into an image; --variations makes
images like one; --mask fills what a mask leaves open; --colorize and --upscale keep the grey values, or the means of
blocks. Results are FOLDER/NAME.png, or NAME-0.png, NAME-1.png ... with --num. Images are cropped and resized to the
size of the model, or, with --tiles, edited whole.

Exit codes: 0, done; 1, some images could not be used, the others are done; 2, the command or the run is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from data.images.decode import BadImageError, ImageFile
from data.prepare.encode import PreparedForm, square_image, whole_image
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from trainer.config.command_line import add_seed_argument
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import (
    add_run_arguments,
    add_weights_argument,
    default_device,
    images_at_once,
    load_run,
)
from trainer.sample.edit import Way, edit_of, edited, known_pixels
from trainer.sample.given import given_image, known_of_mask, opaque_pixels
from trainer.sample.images import check_destination, image_files, save_picture

ALPHA = "alpha"


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.edit", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument("--image", type=path_argument, nargs="+", required=True, help="image files, or folders of them")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--stroke", action="store_true", help="make an image out of a drawing")
    ways.add_argument("--variations", action="store_true", help="make images that are like the given one")
    ways.add_argument(
        "--mask",
        type=_mask_argument,
        metavar="FILE",
        help=f"fill the black parts of this mask; {ALPHA}: fill the transparent parts of each image",
    )
    ways.add_argument("--colorize", action="store_true", help="invent colours, and keep the grey values")
    ways.add_argument(
        "--upscale", type=whole_number(2, 64), metavar="S", help="invent details, and keep the mean of S x S pixels"
    )
    parser.add_argument(
        "--tiles",
        action="store_true",
        help="edit images in their own size, in tiles of the model's size that overlap; with --upscale results are S "
        "times as large as the image",
    )
    parser.add_argument(
        "--start-step",
        type=whole_number(1),
        metavar="K",
        help="how much noise: 1, little, to the model's number of steps, which leaves nothing (default: half of them "
        "for --stroke and --variations, otherwise all)",
    )
    parser.add_argument(
        "--resample", type=whole_number(1, 100), default=1, metavar="N", help="do each step N times (default 1)"
    )
    parser.add_argument("--num", type=whole_number(1, 10_000), default=1, help="results for each image (default 1)")
    parser.add_argument(
        "--class", type=whole_number(0), dest="label", help="class of the results, for a run with classes"
    )
    add_seed_argument(parser, "the same seed gives the same results")
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.out.suffix:
        parser.error(f"--out is {options.out}, but results are written into a folder: give a name without an extension")
    check_destination(options.out)
    return _edit(options)


def _mask_argument(text: str) -> str:
    return text if text == ALPHA else str(path_argument(text))


@dataclass(frozen=True)
class Job:
    """One result.

    Attributes:
        name: of its file.
        given: the image, float32 [C, H, W] in [-1, 1]; all have the same size unless they are edited in tiles.
        known: 1 where a pixel stays, float32 [1, H, W]; None without a mask.
        number: of the result among those of its image.
    """

    name: str
    given: Tensor
    known: Tensor | None
    number: int


def _edit(options: argparse.Namespace) -> int:
    device = default_device()
    generator, diffusion, config = load_run(options.run, options.checkpoint, device, options.weights)
    edit = edit_of(
        _way(options),
        config,
        options.label,
        factor=options.upscale or 1,
        start=options.start_step,
        repeats=options.resample,
        seed=options.seed,
    )
    files, bad = image_files("--image", options.image), list[str]()
    jobs, done = _jobs(files, options, config, bad), 0
    # With tiles, the tiles of an image are the batch.
    size = 1 if options.tiles else images_at_once(config.data.image_size)
    batches = iter(lambda: list(islice(jobs, size)), [])
    total = -(-len(files) * options.num // size)
    for batch in track(batches, "editing", total=total, disable=not sys.stderr.isatty()):
        # Always as many at once: another batch size changes the order of float sums.
        filled = batch + batch[-1:] * (size - len(batch))
        given, numbers = torch.stack([job.given for job in filled]), torch.tensor([job.number for job in filled])
        known = [job.known for job in filled if job.known is not None]
        if known:
            edit = replace(edit, keep=known_pixels(torch.stack(known).to(device)))
        label = None if options.label is None else torch.full((size,), options.label, device=device)
        results = edited(generator, diffusion, config, edit, given.to(device), numbers.to(device), label)
        for job, result in zip(batch, results.cpu(), strict=False):
            save_picture(options.out / f"{job.name}.png", result)
        done += len(batch)
    print(f"{done} images: {options.out}")
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    return 1 if bad else 0


def _way(options: argparse.Namespace) -> Way:
    return next(way for way in get_args(Way) if getattr(options, way))


def _jobs(files: Sequence[Path], options: argparse.Namespace, config: TrainConfig, bad: list[str]) -> Iterator[Job]:
    """The results to make; what cannot be used of the files is added to `bad`."""
    mask = None if options.mask is None or options.mask == ALPHA else _mask(options, config)
    same = len({file.stem for file in files}) < len(files)
    for place, file in enumerate(files):
        try:
            content = file.read_bytes()
            image = given_image(content, config, factor=options.upscale or 1, whole=options.tiles)
            known = opaque_pixels(content, config, whole=options.tiles) if options.mask == ALPHA else None
            if mask is not None:
                size = ImageFile(content).decode(keep_alpha=True).size  # of the upright image
                _check_shape(size, mask.whole.size)
                known = known_of_mask(mask.whole, config, size) if options.tiles else mask.square
        except (BadImageError, OSError) as error:
            bad.append(f"{file}: {error}")
            continue
        name = f"{place:04d}-{file.stem}" if same else file.stem
        for number in range(options.num):
            yield Job(f"{name}-{number}" if options.num > 1 else name, image, known, number)


@dataclass(frozen=True)
class Mask:
    """A mask for all images.

    Attributes:
        whole: its file, grey.
        square: 1 where it is light once it is cropped and resized as images are, float32 [1, H, W].
    """

    whole: Image.Image
    square: Tensor


def _mask(options: argparse.Namespace, config: TrainConfig) -> Mask:
    file = Path(options.mask)
    form = PreparedForm(size=config.data.image_size, channels=1, upscale=True)
    try:
        content = file.read_bytes()
        whole, pixels = whole_image(content, replace(form, size=1)), np.array(square_image(content, form))
    except (BadImageError, OSError) as error:
        raise UserError(f"--mask is {file}, which cannot be used: {error}") from None
    if (np.asarray(whole) if options.tiles else pixels).min() >= 128:
        raise UserError(f"--mask is {file}, which has no black part to fill")
    return Mask(whole, torch.from_numpy(pixels >= 128)[None].float())


def _check_shape(image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Both are cropped to a square: of another shape, the mask would lie elsewhere on the image."""
    (width, height), (wide, high) = image, mask
    if abs(width * high - wide * height) > 0.02 * width * high:
        raise BadImageError(f"has {width}x{height} pixels, another shape than the mask's {wide}x{high}")


if __name__ == "__main__":
    sys.exit(main())
