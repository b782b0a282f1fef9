"""Make an animation that walks between samples of a run: `python -m trainer.walk --run DIR --out walk.webp`.

Exit codes: 0, done; 2, the command, the run or the destination is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch
from rich.progress import track

from data.storage.arguments import ranges_of_whole_numbers, whole_number, whole_numbers
from data.storage.errors import as_command
from data.storage.paths import path_argument
from trainer.sample.draw import (
    add_run_arguments,
    add_weights_argument,
    default_device,
    images_at_once,
    load_run,
)
from trainer.sample.images import check_animation, save_animation
from trainer.sample.walk import walk


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.walk", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument(
        "--seeds",
        type=ranges_of_whole_numbers,
        default=[0, 1, 2],
        metavar="0,7,42",
        help="lead from the first image of each seed to that of the next, and back to the first (default: 0-2)",
    )
    parser.add_argument(
        "--classes",
        type=whole_numbers,
        metavar="3,5",
        help="class of each seed in turn, for a run with data.num_classes (default: 0)",
    )
    parser.add_argument("--frames", type=whole_number(2, 10_000), default=60, help="number of frames (default 60)")
    parser.add_argument("--fps", type=whole_number(1, 100), default=20, help="frames per second (default 20)")
    parser.add_argument("--open", action="store_true", help="end at the last seed instead of returning to the first")
    parser.add_argument("--out", type=path_argument, required=True, help="file to write: .webp, .png, .gif or .mp4")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_animation(options.out)
    generator, diffusion, config = load_run(options.run, options.checkpoint, default_device(), options.weights)
    frames = walk(
        generator,
        diffusion,
        config,
        seeds=options.seeds,
        num_frames=options.frames,
        classes=options.classes,
        closed=not options.open,
    )
    total = -(-options.frames // images_at_once(config.data.image_size))
    drawn = list(track(frames, "drawing", total=total, disable=not sys.stderr.isatty()))
    save_animation(options.out, torch.cat(drawn), options.fps)
    print(f"{options.frames} frames: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
