"""How well runs learned the 25 Gaussians in the plane: `python -m trainer.points --run DIR [--run DIR ...]`.

For each run it counts the modes that were found, and the share of points within three standard deviations of a mode.
With --out it draws the data and the points of each run side by side.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from data.sources.arrays import MODE_DEVIATION_LEVELS, MODE_LEVELS, draw_points
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.files import check_writable
from data.storage.paths import path_argument
from trainer.config.command_line import add_seed_argument
from trainer.sample.draw import sample_run
from trainer.sample.images import save_picture
from trainer.sample.scatter import scatter, side_by_side

NUM_DEVIATIONS = 3.0


@dataclass(frozen=True, kw_only=True)
class PointQuality:
    """How well a set of points covers the mixture."""

    num_points: int
    """Number of points."""
    num_modes: int
    """Number of modes found, of 25. A mode is found if at least a fifth of its equal share of points is close to it."""
    share_close: float
    """Share of the points within three standard deviations of a mode; 0.989 for the mixture itself."""
    smallest_mode_share: float
    """Share of the points close to the mode that has the fewest; 0.04 if all modes were equal."""


def point_quality(points: UInt8[Tensor, "n 2 1 1"]) -> PointQuality:
    """Compare points with the mixture of `data.sources.arrays`.

    Args:
        points: uint8 [N, 2, 1, 1], coordinates as levels.
    """
    if points.ndim != 4 or points.shape[1:] != (2, 1, 1) or not len(points):
        raise UserError(f"samples are {list(points.shape)}, but 2-D points [N, 2, 1, 1] are expected")
    centres = torch.cartesian_prod(*[torch.tensor(MODE_LEVELS, dtype=torch.float64)] * 2)
    distances = torch.cdist(points.flatten(1).double(), centres)
    nearest, mode = distances.min(dim=1)
    close = nearest <= NUM_DEVIATIONS * MODE_DEVIATION_LEVELS
    counts = torch.bincount(mode[close], minlength=len(centres))
    return PointQuality(
        num_points=len(points),
        num_modes=int((counts >= len(points) / len(centres) / 5).sum()),
        share_close=close.double().mean().item(),
        smallest_mode_share=counts.min().item() / len(points),
    )


def data_points(num: int, seed: int) -> UInt8[Tensor, "n 2 1 1"]:
    """Points drawn from the mixture itself."""
    points, _ = draw_points(num, seed=seed)
    return torch.from_numpy(np.ascontiguousarray(points))[:, :, None, None]


@as_command(name="trainer.points", failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0, or 2 after one line that says what to change."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.points", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument(
        "--run", type=path_argument, action="append", required=True, metavar="DIR", help="may be repeated"
    )
    parser.add_argument("--num", type=whole_number(1), default=10_000, help="points to draw from each (default: 10000)")
    add_seed_argument(parser, "of the points")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE.png", help="draw the data, then each run, as one picture"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per set of points")
    options = parser.parse_args(arguments)
    if options.out and options.out.suffix != ".png":
        raise UserError(f"--out is {options.out}: give a name that ends in .png")
    if options.out:
        check_writable(options.out)
    sets = {"data": data_points(options.num, options.seed + 1)}
    sets |= {str(run): sample_run(run, options.num, options.seed) for run in options.run}
    found = {name: point_quality(points) for name, points in sets.items()}
    if options.out:
        save_picture(options.out, side_by_side([scatter(points) for points in sets.values()]))
    for name, quality in found.items():
        if options.json:
            sys.stdout.write(json.dumps({"samples": name, **asdict(quality)}) + "\n")
        else:
            sys.stdout.write(
                f"{name}: {quality.num_modes} of 25 modes, {quality.share_close:.1%} of {quality.num_points} points "
                f"within 3 standard deviations of one, smallest mode {quality.smallest_mode_share:.2%}\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
