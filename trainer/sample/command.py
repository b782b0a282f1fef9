"""Draw images from a run: `python -m trainer.sample --run DIR --num 64 --seed 0 --out grid.png`.

Image i is a function of the weights, the seed and i. Its noise is keyed by (seed, i), and the batch size is always the
same (the last batch is padded), because another size changes the order of the network's float sums.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import get_args

from data.storage.arguments import ranges_of_whole_numbers, whole_number, whole_numbers
from data.storage.errors import as_command
from data.storage.paths import path_argument
from models.diffusion import Sampler
from trainer.config.command_line import add_seed_argument
from trainer.sample.draw import add_run_arguments, add_weights_argument, sample_run
from trainer.sample.images import check_destination, save_images


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.sample", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument("--num", type=whole_number(1), help="number of images (default 64)")
    add_seed_argument(parser, "the same seed gives the same images")
    parser.add_argument(
        "--seeds",
        type=ranges_of_whole_numbers,
        metavar="0-63,99",
        help="draw the first image of each of these seeds, in place of --seed and --num",
    )
    parser.add_argument(
        "--sampler",
        choices=get_args(Sampler),
        default="ancestral",
        help="ancestral (default), or deterministic (DDIM) for a run with objective gaussian",
    )
    parser.add_argument(
        "--classes",
        type=whole_numbers,
        metavar="3,5",
        help="classes to draw in turn, for a run with data.num_classes (default: all)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="for a run with training.label_dropout: above 1, images are more typical of their class (default 1)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="on a GPU: bfloat16, compiled, large batches; images differ slightly"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, help="grid.png, images.npz, or a folder for one PNG each"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.seeds is not None and options.num is not None:
        parser.error("--num cannot be given together with --seeds: each seed gives one image")
    check_destination(options.out)
    num = len(options.seeds) if options.seeds is not None else options.num or 64
    images = sample_run(
        options.run,
        num,
        options.seed,
        options.checkpoint,
        options.sampler,
        options.classes,
        options.guidance,
        options.fast,
        options.weights,
        options.seeds,
    )
    save_images(options.out, images)
    print(f"{num} images: {options.out}")
    return 0
