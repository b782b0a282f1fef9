"""2-D points as a picture: the density of points at each place."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

SIDE_PIXELS = 384
"""Height and width of a panel; the 256 levels are scaled to it."""
GAP_PIXELS = 8
GAP_LEVEL = 128


def scatter(points: UInt8[Tensor, "n 2 1 1"]) -> UInt8[Tensor, "1 side side"]:
    """Draw black on white: x to the right, y upwards, both 0 .. 255. One point gives grey, many points give black."""
    levels = points.flatten(1).cpu().numpy().astype(np.float64)
    hits, _, _ = np.histogram2d(levels[:, 0], levels[:, 1], bins=256, range=[[-0.5, 255.5]] * 2)
    ink = 1 - np.exp(-hits * 256 / max(1, len(levels)) * 8)
    ink[hits > 0] = ink[hits > 0].clip(0.25)
    places = (np.arange(SIDE_PIXELS) * 256 // SIDE_PIXELS).astype(int)
    upright = ink[places][:, places].T[::-1]
    return torch.from_numpy(np.rint(255 * (1 - upright)).astype(np.uint8).copy())[None]


def side_by_side(panels: Sequence[UInt8[Tensor, "1 side side"]]) -> UInt8[Tensor, "1 side wide"]:
    """Panels from left to right with a grey gap between them."""
    gap = torch.full((1, SIDE_PIXELS, GAP_PIXELS), GAP_LEVEL, dtype=torch.uint8)
    parts = [part for panel in panels for part in (gap, panel)]
    return torch.cat(parts[1:], dim=2)
