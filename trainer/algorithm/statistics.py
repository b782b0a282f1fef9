"""Statistics of updates: sums that stay on the device, each declared with the way it becomes a curve.

An update returns its `Statistics` by name. Whoever makes one declares it next to the update as a `Statistic`, which
says what its sum is divided by; whoever draws curves needs no other knowledge of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.shapes import Timestep

Statistics = dict[str, Tensor]
"""Sums over micro-batches, each weighted by its share: summed over the ranks they are means over the global batch."""


@dataclass(frozen=True)
class Statistic:
    """One quantity: a scalar, or a vector with a value for each timestep.

    Attributes:
        name: in checkpoints and in `Statistics`.
        curve: its name in the curves; those of a vector are `curve/t0`, `curve/t1` ... None: it is not drawn.
        over: name of the statistic that counts what the sum is a mean over: a vector is divided by it timestep by
            timestep, a scalar by its total. None: the curve shows the sum itself.
        by_timestep: it is a vector.
        label: what the diagnosis of skipped updates calls it; empty: it is left out there.
        kept: whether its sum is kept for the curves.
    """

    name: str
    curve: str | None = None
    over: str | None = None
    by_timestep: bool = False
    label: str = ""
    kept: bool = True


def mean(name: str, over: str, *, curve: str | None = None) -> Statistic:
    """A scalar whose curve is its mean over what `over` counts; the curve has its name if no other is given."""
    return Statistic(name, curve or name, over, label=name)


def mean_by_timestep(name: str, over: str, *, curve: str, label: str) -> Statistic:
    """The same timestep by timestep."""
    return Statistic(name, curve, over, by_timestep=True, label=label)


def count(name: str, *, by_timestep: bool = False) -> Statistic:
    """A statistic that others are divided by."""
    return Statistic(name, by_timestep=by_timestep)


def diagnostic(name: str, *, label: str) -> Statistic:
    """A vector by timestep that no curve shows; it serves to explain skipped updates."""
    return Statistic(name, by_timestep=True, label=label, kept=False)


def total(name: str) -> Statistic:
    """A scalar whose curve is its sum."""
    return Statistic(name, curve=name)


def by_timestep(num_timesteps: int, t: Timestep, values: Float[Tensor, "b"]) -> Float[Tensor, "t"]:
    """Sums of `values` per timestep over the micro-batch, divided by its size; of ones, the timesteps' frequencies."""
    zeros = torch.zeros(num_timesteps, device=t.device)
    return zeros.index_add(0, t, values.detach().to(zeros.dtype)) / len(t)


def add_statistics(total: Statistics, statistics: Statistics, share: float) -> None:
    """Add a micro-batch's statistics to those of the ones before it, weighted by its share of the batch."""
    if share == 0:  # a micro-batch that only fills up
        return
    for name, value in statistics.items():
        weighted = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * share
        total[name] = total[name] + weighted if name in total else weighted
