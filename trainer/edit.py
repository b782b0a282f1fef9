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
    add_checkpoint_argument,
    add_weights_argument,
    default_device,
    images_at_once,
    load_run,
)
from trainer.sample.edit import Edit, Keep, block_means, edited, grey_values, known_pixels
from trainer.sample.images import check_destination, save_picture

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ALPHA = "alpha"


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.edit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=path_argument, required=True, help="directory of the run, of a snapshot, or of an exported model"
    )
    add_checkpoint_argument(parser)
    add_weights_argument(parser)
    parser.add_argument("--image", type=path_argument, nargs="+", required=True, help="image files, or folders of them")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--stroke", action="store_true", help="make an image out of a drawing")
    ways.add_argument("--variations", action="store_true", help="make images that are like the given one")
    ways.add_argument(
        "--mask",
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
    parser.add_argument("--class", type=whole_number(0), dest="label", help="class, for a run with classes (default 0)")
    add_seed_argument(parser, "the same seed gives the same results")
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.out.suffix:
        parser.error(f"--out is {options.out}, but results are written into a folder: give a name without an extension")
    check_destination(options.out)
    return _edit(options)


def _edit(options: argparse.Namespace) -> int:
    device = default_device()
    generator, diffusion, config = load_run(options.run, options.checkpoint, device, options.weights)
    _check(options, config)
    files = list(_files(options.image))
    free = not (options.stroke or options.variations)
    T = diffusion.num_timesteps
    start = options.start_step or (T if free else max(1, T // 2))
    label = None if not config.data.num_classes else options.label or 0
    common_mask = _mask(Path(options.mask), config) if options.mask not in (None, ALPHA) else None
    batch, bad = images_at_once(config.data.image_size), list[str]()
    options.out.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(track(files, "editing", disable=not sys.stderr.isatty())):
        try:
            image = _image(file, config)
            mask = _alpha(file, config) if options.mask == ALPHA else common_mask
        except (BadImageError, OSError) as error:
            bad.append(f"{file}: {error}")
            continue
        edit = Edit(start=start, keep=_keep(options, mask, device), repeats=options.resample, seed=options.seed)
        name = f"{file.stem}" if len({f.stem for f in files}) == len(files) else f"{number:04d}-{file.stem}"
        for begun in range(0, options.num, batch):
            size = min(batch, options.num - begun)
            labels = None if label is None else torch.full((size,), label, device=device)
            given = image.to(device).expand(size, -1, -1, -1)
            first = number * options.num + begun
            for i, result in enumerate(edited(generator, diffusion, config, edit, given, first, labels).cpu()):
                end = f"-{begun + i}" if options.num > 1 else ""
                save_picture(options.out / f"{name}{end}.png", result)
    print(f"{(len(files) - len(bad)) * options.num} images: {options.out}")
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    return 1 if bad else 0


def _check(options: argparse.Namespace, config: TrainConfig) -> None:
    if config.image_form.channels == 2:
        raise UserError("this run draws points in the plane, not images")
    if options.colorize and config.image_form.channels == 1:
        raise UserError("--colorize is given, but this run draws grey images")
    if options.upscale and config.data.image_size % options.upscale:
        raise UserError(
            f"--upscale is {options.upscale}, which does not divide the image size {config.data.image_size}"
        )
    if options.label is not None and options.label >= config.data.num_classes:
        allowed = f"0 to {config.data.num_classes - 1}" if config.data.num_classes else "none, this run has no classes"
        raise UserError(f"--class is {options.label}; allowed: {allowed}")


def _files(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"the folder {path} holds no image: known are {', '.join(SUFFIXES)}")
            yield from found
        elif path.exists():
            yield path
        else:
            raise UserError(f"--image is {path}: there is no such file or folder")


def _keep(options: argparse.Namespace, mask: Tensor | None, device: torch.device) -> Keep | None:
    if mask is not None:
        return known_pixels(mask.to(device))
    if options.colorize:
        return grey_values
    return block_means(options.upscale) if options.upscale else None


def _image(file: Path, config: TrainConfig) -> Tensor:
    """float32 [1, C, H, W] in [-1, 1], cropped and resized as `data.prepare` does."""
    size, channels = config.data.image_size, config.image_form.channels
    form = PreparedForm(size=size, channels=1 if channels == 1 else 3, upscale=True)
    pixels = np.array(square_image(file.read_bytes(), form)).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def _mask(file: Path, config: TrainConfig) -> Tensor:
    """1 where a mask is light: float32 [1, 1, H, W]."""
    form = PreparedForm(size=config.data.image_size, channels=1, upscale=True)
    try:
        pixels = np.array(square_image(file.read_bytes(), form))
    except (BadImageError, OSError) as error:
        raise UserError(f"--mask is {file}, which cannot be used: {error}") from None
    return torch.from_numpy(pixels >= 128)[None, None].float()


def _alpha(file: Path, config: TrainConfig) -> Tensor:
    """1 where an image is opaque."""
    image = ImageFile(file.read_bytes()).decode(keep_alpha=True)
    if not image.has_transparency_data:
        raise BadImageError("has no transparent parts, which --mask alpha would fill")
    alpha, size = image.convert("RGBA").getchannel("A"), config.data.image_size
    side = min(alpha.size)
    left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
    pixels = np.array(alpha.resize((size, size), box=(left, top, left + side, top + side)))
    return torch.from_numpy(pixels == 255)[None, None].float()


if __name__ == "__main__":
    sys.exit(main())
