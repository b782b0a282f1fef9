"""Memorization: samples beside their nearest training images; how many are closer than data are to each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.shards.grid import lay_out
from data.storage.errors import UserError
from models.shapes import Uint8Image
from trainer.evaluate.quality import ROWS_AT_ONCE, Features
from trainer.sample.images import GRID_WIDTH_PIXELS, save_picture

NUM_NEIGHBOURS = 5
NUM_ROWS = 10
"""Samples in the picture: those that are closest to a training image."""
QUANTILE = 0.05
NUM_SPARE = 3


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Nearest reference images of some samples."""

    indices: Int64[Tensor, "n k"]
    """Numbers of the nearest reference images, the nearest first."""
    distances: Float[Tensor, "n k"]
    """Euclidean distances to them, in the features."""
    reference_nearest: Float[Tensor, " m"]
    """Distance of each reference image to the nearest other one."""

    @property
    def threshold(self) -> float:
        """The distance below which only 5% of the reference images have another one."""
        return self.reference_nearest.quantile(QUANTILE).item()

    @property
    def closer_share(self) -> float:
        """Share of samples that are closer than that to a reference image: about 0.05 for unseen images of the data."""
        return (self.distances[:, 0] < self.threshold).double().mean().item()

    def figures(self) -> dict[str, float]:
        """The figures for JSON."""
        return {
            "closer_share": self.closer_share,
            "nearest_median_samples": self.distances[:, 0].median().item(),
            "nearest_median_reference": self.reference_nearest.median().item(),
        }

    def lines(self) -> list[str]:
        """The figures as lines of a table."""
        figures = self.figures()
        return [
            f"{'closer than data to each other':<34}{self.closer_share:>10.1%}, about {QUANTILE:.0%} for unseen images",
            f"{'median distance to the nearest':<34}{figures['nearest_median_samples']:>10.4g}, "
            f"among the reference {figures['nearest_median_reference']:.4g}",
        ]


def find_neighbours(samples: Features, reference: Features) -> Neighbours:
    """Search the nearest reference images.

    Args:
        samples: features [N, d], N > 0.
        reference: features [M, d], M > 1. Images that it holds twice have distance 0 and lower the threshold.
    """
    distances, indices = _nearest(samples, reference, NUM_NEIGHBOURS)
    own, _ = _nearest(reference, reference, 1, without_itself=True)
    return Neighbours(indices=indices, distances=distances, reference_nearest=own[:, 0])


def draw_neighbours(
    file: Path,
    found: Neighbours,
    pick_samples: Callable[[Sequence[int]], Uint8Image],
    pick_reference: Callable[[Sequence[int]], Uint8Image],
) -> None:
    """Write a picture: a row for each of the 10 closest samples, the sample first, then its nearest reference images.

    At the left is the distance to the nearest one, over the median of such distances within the reference.

    Args:
        file: name with .png; its folder exists.
        found: from `find_neighbours`.
        pick_samples: samples of these numbers, uint8 [N, C, H, W].
        pick_reference: the same for the reference.

    Raises:
        UserError: samples and reference have other shapes.
    """
    closest = found.distances[:, 0].argsort(stable=True)[:NUM_ROWS]
    samples = pick_samples(closest.tolist())
    neighbours = pick_reference(found.indices[closest].flatten().tolist())
    if samples.shape[1:] != neighbours.shape[1:]:
        raise UserError(
            f"the samples are {list(samples.shape[1:])}, the reference is {list(neighbours.shape[1:])}: --neighbours "
            "draws them side by side, so channels, height and width must be equal"
        )
    rows = torch.cat([samples[:, None], neighbours.unflatten(0, (len(closest), -1))], dim=1)
    unit = found.reference_nearest.median().item() or 1.0
    names = [f"{distance / unit:.2f}" for distance in found.distances[closest, 0].tolist()]
    pixels = rows.flatten(0, 1).permute(0, 2, 3, 1).numpy()
    grid = lay_out(pixels, columns=rows.shape[1], min_width=GRID_WIDTH_PIXELS, row_names=names)
    save_picture(file, torch.from_numpy(grid).permute(2, 0, 1))


def _nearest(
    points: Features, centres: Features, k: int, *, without_itself: bool = False
) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Distances to the k nearest centres, or to all if there are fewer, and their numbers, the nearest first.

    The search uses a product of matrices, whose rounding hides small differences. So it is made around the mean, for a
    few more than k, whose distances are then computed exactly.
    """
    k = min(k, len(centres) - without_itself)
    searched = min(k + NUM_SPARE, len(centres) - without_itself)
    mean = centres.mean(dim=0)
    distances, indices = [], []
    for first in range(0, len(points), ROWS_AT_ONCE):
        chunk = points[first : first + ROWS_AT_ONCE]
        to_all = torch.cdist(chunk - mean, centres - mean)
        if without_itself:
            rows = torch.arange(len(chunk))
            to_all[rows, first + rows] = torch.inf
        found = to_all.topk(searched, largest=False).indices
        exact = torch.stack([(chunk - centres[column]).norm(dim=1) for column in found.T], dim=1)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        distances.append(exact.gather(1, order))
        indices.append(found.gather(1, order))
    return torch.cat(distances), torch.cat(indices)
