"""Translate images with a run of pairs: `python -m trainer.translate --run DIR --input FILE --num 4 --out FOLDER`.

For each input, FOLDER gets NAME-0.png, NAME-1.png ..., their mean NAME-mean.png and their standard deviation in grey
levels NAME-std.png; with --num 1 NAME.png alone. A model whose images are neither grey nor RGB writes arrays instead,
NAME-0.npy ... (--tiff: TIFF files), and NAME.png, a picture with a row for each of them and a column for each channel.
An input is an image, a .npy file, or a folder of them, cropped and resized as `data.prepare` does. Or it is a prepared
data set of pairs: then the results are compared with its images.

Exit codes: 0, done; 1, some inputs could not be used, the others are done; 2, the command or the run is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import tee
from pathlib import Path

import torch
from rich.progress import track

from data.images.decode import BadImageError
from data.images.shown import PICTURE_CHANNELS
from data.images.tiff import can_use_tifffile
from data.shards.index import INDEX_NAME
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from models.shapes import Uint8Image
from trainer.config.command_line import add_seed_argument
from trainer.config.train_config import TrainConfig
from trainer.sample.conditions import PreparedPairs, read_condition, translations
from trainer.sample.draw import (
    Loaded,
    add_run_arguments,
    add_weights_argument,
    check_guidance,
    default_device,
    load_run,
)
from trainer.sample.edit import check_label
from trainer.sample.fidelity import Fidelity
from trainer.sample.images import SUFFIXES, check_destination, image_files, save_grid, save_image

Input = tuple[str, Uint8Image, int | None, Uint8Image | None]
"""Name, condition [1, K, H, W], label and, of a prepared data set, the image [1, C, H, W]."""


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.translate", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument(
        "--input",
        type=path_argument,
        nargs="+",
        required=True,
        help="images or .npy files, folders of them, or one prepared data set of pairs",
    )
    parser.add_argument("--num", type=whole_number(1), default=4, help="results for each input (default 4)")
    parser.add_argument("--max-inputs", type=whole_number(1), metavar="N", help="translate the first N inputs")
    parser.add_argument(
        "--class", type=whole_number(0), dest="label", help="class of the results, for a run with classes"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="for a run with training.condition_dropout: above 1, results follow their input more closely (default 1)",
    )
    add_seed_argument(parser, "the same seed gives the same results")
    parser.add_argument(
        "--tiff",
        action="store_true",
        help="write results of other than one or three channels as TIFF instead of .npy files (extra tiff)",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="new or empty folder for the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.out.suffix:
        raise UserError(f"--out is {options.out}: give the name of a folder, without a suffix")
    check_destination(options.out)
    if options.tiff and not can_use_tifffile():
        raise UserError("--tiff needs tifffile, which this Python does not have: pip install '.[tiff]'")
    return _translate(options)


def _translate(options: argparse.Namespace) -> int:
    loaded = load_run(options.run, options.checkpoint, default_device(), options.weights)
    config = loaded[2]
    if not config.data.condition_channels:
        raise UserError(f"{options.run} was not trained on pairs, so it cannot translate: see trainer.sample")
    check_guidance(options.guidance, config)
    bad: list[str] = []
    prepared = len(options.input) == 1 and (options.input[0] / INDEX_NAME).is_file()
    if prepared:
        with PreparedPairs(options.input[0], config) as pairs:
            number = min(len(pairs), options.max_inputs or len(pairs))
            done = _draw_all(_of_pairs(pairs, number, options.label, config), number, loaded, options)
    else:
        files = image_files("--input", options.input, (*SUFFIXES, ".npy"))[: options.max_inputs]
        done = _draw_all(_of_files(files, options.label, config, bad), len(files), loaded, options)
    print(f"{done} inputs: {options.out}")
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    return 1 if bad else 0


def _of_files(files: Sequence[Path], label: int | None, config: TrainConfig, bad: list[str]) -> Iterator[Input]:
    """Files as inputs; what cannot be used of them is added to `bad`."""
    check_label(label, config.data.num_classes)
    same = len({file.stem for file in files}) < len(files)
    for place, file in enumerate(files):
        try:
            condition = read_condition(file.read_bytes(), config)
        except (BadImageError, OSError) as error:
            bad.append(f"{file}: {error}")
            continue
        yield (f"{place:04d}-{file.stem}" if same else file.stem), condition, label, None


def _of_pairs(pairs: PreparedPairs, number: int, label: int | None, config: TrainConfig) -> Iterator[Input]:
    """The pairs of a prepared data set as inputs, with the labels that they have there unless one is given."""
    if label is not None or pairs.index.num_classes is None:
        check_label(label, config.data.num_classes)
    for i in range(number):
        image, condition, (own,) = pairs.read([i])
        yield f"{i:06d}", condition, own if label is None and config.data.num_classes else label, image


def _draw_all(inputs: Iterator[Input], number: int, loaded: Loaded, options: argparse.Namespace) -> int:
    """Draw and write the results of all inputs; print how close they are to the images of pairs. Their number."""
    fidelity, done, hidden = Fidelity(), 0, not sys.stderr.isatty()
    inputs, read_ahead = tee(inputs)
    given = ((condition, label) for _, condition, label, _ in read_ahead)
    drawn = translations(loaded, given, num=options.num, seed=options.seed, guidance=options.guidance)
    shown = track(drawn, "translating", total=number, disable=hidden)
    for (name, condition, _, image), results in zip(inputs, shown, strict=True):
        written = {"": results[0]}
        if options.num > 1:
            levels = results.float()
            written = {f"-{i}": result for i, result in enumerate(results)}
            written["-mean"] = levels.mean(dim=0).round().to(torch.uint8)
            written["-std"] = levels.std(dim=0, correction=0).round().to(torch.uint8)
        for part, result in written.items():
            save_image(options.out / f"{name}{part}", result, tiff=options.tiff)
        if results.shape[1] not in PICTURE_CHANNELS:
            save_grid(options.out / f"{name}.png", torch.stack([*written.values()]), columns=1)
        if image is not None:
            fidelity.add(image, results[None], condition)
        done += 1
    if fidelity.num_images:
        sys.stdout.write(fidelity.table() + "\n")
    return done


if __name__ == "__main__":
    sys.exit(main())
