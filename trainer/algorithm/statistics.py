"""Statistics of updates: sums that stay on the device, each declared with how it becomes a curve.

An update returns `Statistics` by name. Each is declared next to the update as a `Statistic`, which says what the sum is
divided by. Code that draws curves needs to know nothing else.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.shapes import Logits, Timestep

Statistics = dict[str, Tensor]
"""Sums over micro-batches, each weighted by its share. Summed over the ranks, they are means over the global batch."""


@dataclass(frozen=True)
class Statistic:
    """One quantity: a scalar, or a vector with one value per timestep.

    Attributes:
        name: key in checkpoints and in `Statistics`.
        curve: name of its curve; the curves of a vector are `curve/t0`, `curve/t1` ... None: it has no curve.
        over: name of the statistic that divides the sum to make it a mean: a vector is divided per timestep, a scalar
            by the total. None: the curve shows the sum itself.
        by_timestep: whether it is a vector.
        label: its name in the diagnosis of skipped updates; empty: it does not appear there.
        kept: whether its sum is kept for the curves.
    """

    name: str
    curve: str | None = None
    over: str | None = None
    by_timestep: bool = False
    label: str = ""
    kept: bool = True


def mean(name: str, over: str, *, curve: str | None = None) -> Statistic:
    """A scalar whose curve is its mean over what `over` counts. The curve is called `name` unless `curve` is given."""
    return Statistic(name, curve or name, over, label=name)


def mean_by_timestep(name: str, over: str, *, curve: str, label: str) -> Statistic:
    """A vector whose curves are its means per timestep over what `over` counts."""
    return Statistic(name, curve, over, by_timestep=True, label=label)


def count(name: str, *, by_timestep: bool = False) -> Statistic:
    """A count by which other statistics are divided; it has no curve."""
    return Statistic(name, by_timestep=by_timestep)


def diagnostic(name: str, *, label: str) -> Statistic:
    """A vector by timestep without a curve, used only to diagnose skipped updates."""
    return Statistic(name, by_timestep=True, label=label, kept=False)


def total(name: str) -> Statistic:
    """A scalar whose curve is its sum."""
    return Statistic(name, curve=name)


def by_timestep(num_timesteps: int, t: Timestep, values: Float[Tensor, " b"]) -> Float[Tensor, " t"]:
    """Sums of `values` per timestep over the micro-batch, divided by its size. For ones: each timestep's frequency."""
    zeros = torch.zeros(num_timesteps, device=t.device)
    return zeros.index_add(0, t, values.detach().to(zeros.dtype)) / len(t)


def logit_statistics(num_timesteps: int, t: Timestep, logits_real: Logits, logits_fake: Logits) -> Statistics:
    """D's logits for real and fake pairs by timestep, and how often each timestep occurred."""
    of_each = {"logits_real": logits_real, "logits_fake": logits_fake, "frequency_t": torch.ones_like(logits_real)}
    return {name: by_timestep(num_timesteps, t, values) for name, values in of_each.items()}


def add_statistics(total: Statistics, statistics: Statistics, share: float) -> None:
    """Add a micro-batch's statistics to the running total, weighted by its share of the batch."""
    if share == 0:  # padding
        return
    for name, value in statistics.items():
        weighted = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * share
        total[name] = total[name] + weighted if name in total else weighted
