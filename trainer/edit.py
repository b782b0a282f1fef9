"""Edit images with a trained run: `python -m trainer.edit --run DIR --image FILE --stroke --out FOLDER`.

Every way of editing noises an image and denoises it again. --stroke turns a drawing into an image; --variations makes
images like one; --mask fills what a mask leaves open; --colorize and --upscale keep the grey values, or the means of
blocks. Results are FOLDER/NAME.png, or NAME-0.png, NAME-1.png ... with --num.

Exit codes: 0, done; 1, some images could not be used, the others are done; 2, the command or the run is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from data.images.decode import BadImageError, ImageFile
from data.prepare.encode import PreparedForm, square_image
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
from trainer.sample.edit import Edit, Keep, block_means, edited, grey_values, known_pixels
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
        given: the image, float32 [C, H, W] in [-1, 1].
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
    _check(options, config)
    files, bad = image_files("--image", options.image), list[str]()
    T, free = diffusion.num_timesteps, not (options.stroke or options.variations)
    start = options.start_step or (T if free else max(1, T // 2))
    if start == T and not free:
        more = "give a smaller --start-step" if T > 1 else "a model of one step cannot do that"
        raise UserError(f"noised to step {T} of {T}, nothing is left of the image: {more}")
    jobs, done = _jobs(files, options, config, bad), 0
    size = images_at_once(config.data.image_size)
    batches = iter(lambda: list(islice(jobs, size)), [])
    total = -(-len(files) * options.num // size)
    for batch in track(batches, "editing", total=total, disable=not sys.stderr.isatty()):
        given, numbers = torch.stack([job.given for job in batch]), torch.tensor([job.number for job in batch])
        known = [job.known for job in batch if job.known is not None]
        edit = Edit(
            start=start,
            keep=_keep(options, torch.stack(known).to(device) if known else None),
            repeats=options.resample,
            seed=options.seed,
        )
        label = None if options.label is None else torch.full((len(batch),), options.label, device=device)
        results = edited(generator, diffusion, config, edit, given.to(device), numbers.to(device), label)
        options.out.mkdir(parents=True, exist_ok=True)
        for job, result in zip(batch, results.cpu(), strict=True):
            save_picture(options.out / f"{job.name}.png", result)
        done += len(batch)
    print(f"{done} images: {options.out}")
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    return 1 if bad else 0


def _jobs(files: Sequence[Path], options: argparse.Namespace, config: TrainConfig, bad: list[str]) -> Iterator[Job]:
    """The results to make; what cannot be used of the files is added to `bad`."""
    file_of_mask = None if options.mask is None or options.mask == ALPHA else Path(options.mask)
    common = None if file_of_mask is None else _mask(file_of_mask, config)
    shape = None if file_of_mask is None else _size(file_of_mask)
    same = len({file.stem for file in files}) < len(files)
    for place, file in enumerate(files):
        try:
            image = _image(file, config, options.upscale or 1)
            known = _alpha(file, config) if options.mask == ALPHA else common
            if shape is not None:
                _check_shape(_size(file), shape)
        except (BadImageError, OSError) as error:
            bad.append(f"{file}: {error}")
            continue
        name = f"{place:04d}-{file.stem}" if same else file.stem
        for number in range(options.num):
            yield Job(f"{name}-{number}" if options.num > 1 else name, image, known, number)


def _check(options: argparse.Namespace, config: TrainConfig) -> None:
    if config.image_form.channels == 2:
        raise UserError("this run draws points in the plane, not images")
    if options.colorize and config.image_form.channels == 1:
        raise UserError("--colorize is given, but this run draws grey images")
    if options.upscale and config.data.image_size % options.upscale:
        raise UserError(
            f"--upscale is {options.upscale}, which does not divide the image size {config.data.image_size}"
        )
    num_classes = config.data.num_classes
    if num_classes and options.label is None:
        raise UserError(f"--class is missing: this run has the classes 0 to {num_classes - 1}, and a result is of one")
    if options.label is not None and options.label >= num_classes:
        allowed = f"0 to {num_classes - 1}" if num_classes else "none, this run has no classes"
        raise UserError(f"--class is {options.label}; allowed: {allowed}")


def _keep(options: argparse.Namespace, known: Tensor | None) -> Keep | None:
    if known is not None:
        return known_pixels(known)
    if options.colorize:
        return grey_values
    return block_means(options.upscale) if options.upscale else None


def _image(file: Path, config: TrainConfig, factor: int) -> Tensor:
    """float32 [C, H, W] in [-1, 1], cropped and resized as `data.prepare` does; of equal blocks of `factor` pixels."""
    size, channels = config.data.image_size // factor, config.image_form.channels
    form = PreparedForm(size=size, channels=1 if channels == 1 else 3, upscale=True)
    pixels = np.array(square_image(file.read_bytes(), form)).reshape(size, size, channels)
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _mask(file: Path, config: TrainConfig) -> Tensor:
    """1 where a mask is light: float32 [1, H, W]."""
    form = PreparedForm(size=config.data.image_size, channels=1, upscale=True)
    try:
        pixels = np.array(square_image(file.read_bytes(), form))
    except (BadImageError, OSError) as error:
        raise UserError(f"--mask is {file}, which cannot be used: {error}") from None
    if pixels.min() >= 128:
        raise UserError(f"--mask is {file}, which has no black part to fill")
    return torch.from_numpy(pixels >= 128)[None].float()


def _size(file: Path) -> tuple[int, int]:
    """Width and height of the upright image."""
    return ImageFile(file.read_bytes()).decode(keep_alpha=True).size


def _check_shape(image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Both are cropped to a square: of another shape, the mask would lie elsewhere on the image."""
    (width, height), (wide, high) = image, mask
    if abs(width * high - wide * height) > 0.02 * width * high:
        raise BadImageError(f"has {width}x{height} pixels, another shape than the mask's {wide}x{high}")


def _alpha(file: Path, config: TrainConfig) -> Tensor:
    """1 where an image is opaque."""
    image = ImageFile(file.read_bytes()).decode(keep_alpha=True)
    alpha, size = image.convert("RGBA").getchannel("A"), config.data.image_size
    if alpha.getextrema()[0] == 255:
        raise BadImageError("has no transparent parts, which --mask alpha would fill")
    side = min(alpha.size)
    left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
    pixels = np.array(alpha.resize((size, size), box=(left, top, left + side, top + side)))
    return torch.from_numpy(pixels == 255)[None].float()


if __name__ == "__main__":
    sys.exit(main())
