"""Updates skipped one after the other: counted and kept on the device, read where the curves are logged.

A healthy run passes by unchanged. One whose last `guard.max_skipped_in_row` updates of a network were skipped goes back
to its last checkpoint; where that does not help, it ends and says what it has seen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.algorithm.method import PART_NAMES, Part
from trainer.algorithm.statistics import Statistic, Statistics, total
from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks

_ADVICE = (
    "Data and draws are functions of the seed and the step, so what comes back at the same step is of the run itself, "
    "not of a machine that failed for a moment. If one rank alone is named, look at its device and data. Otherwise "
    "start anew with a lower training.learning_rate_d.peak or learning_rate_g.peak, a larger training.r1_gamma or "
    "training.adam.eps, or training.precision=fp32; run.init_from takes the weights of an earlier snapshot. guard.* "
    "and scaling.* may be changed for this run as well"
)


class DivergenceError(RuntimeError):
    """The run cannot go on: its updates are skipped again and again. Says what was seen and what to try."""


class Diverged(Exception):  # noqa: N818 - not an error as long as the run can go back
    """Raised on all ranks at a log point: a network's last updates were all skipped.

    Attributes:
        final: the run has gone back as often as it may.
    """

    def __init__(self, diagnosis: str, *, final: bool) -> None:
        super().__init__(diagnosis)
        self.final = final

    def error(self, reason: str) -> DivergenceError:
        """What ends the run, for `reason`."""
        return DivergenceError(f"{self}\nThe run ends: {reason}. {_ADVICE}")


@dataclass
class SkippedUpdates:
    """Follows the updates of the networks that are trained.

    Attributes:
        config: the limits.
        device: where the updates are made.
        parts: the networks.
        counted: statistics of their updates.
        world_size: ranks that count the same updates.
        num_rollbacks: how often the run went back because of steps that it has not yet got past.
    """

    config: GuardConfig
    device: torch.device
    parts: tuple[Part, ...]
    counted: tuple[Statistic, ...]
    world_size: int = 1
    num_rollbacks: int = 0

    def __post_init__(self) -> None:
        self._nothing = torch.zeros((), device=self.device)
        self._seen: dict[Part, Statistics] = {part: {} for part in self.parts}
        self._kept = {statistic.name for statistic in self.counted if statistic.kept}
        self._failed_at = 0
        self.load_rows({})

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it adds to the statistics of the updates: sums of the skipped ones."""
        return tuple(total(f"skipped_updates_{part}") for part in self.parts)

    def take_in(self, part: Part, guard: UpdateGuard, statistics: Statistics) -> Statistics:
        """Note one update of `part`; reads nothing off the device.

        Returns:
            `statistics` for the curves, zero if the update was skipped, and this rank's share of the number of skipped
            updates: those of all ranks sum to 0 or 1.
        """
        skipped, nothing, before = guard.skipped > 0, self._nothing, self._seen[part]
        now = {"gradient_norm": guard.norm, **statistics}
        # The first of a row is the one to look at: what comes after it may be its consequence. A value that the update
        # does not have, as R1 in most steps, is zero.
        first = skipped & (self._noted[part] == 0)
        self._seen[part] = {
            name: torch.where(first, now.get(name, nothing), before.get(name, nothing)) for name in now | before
        }
        for counts in (self._rows, self._noted):
            counts[part] = (counts[part] + 1) * guard.skipped
        kept = {
            name: torch.where(skipped, torch.zeros_like(value), value)
            for name, value in statistics.items()
            if name in self._kept
        }
        return {**kept, f"skipped_updates_{part}": guard.skipped / self.world_size}

    def rows(self) -> dict[str, int]:
        """Updates skipped in a row up to now, by network; for the manifest. Waits for the device."""
        return {part: int(row) for part, row in self._rows.items()}

    def load_rows(self, rows: Mapping[str, int]) -> None:
        """Go on from the rows of a checkpoint. What they looked like is not known any more."""
        self._rows = {part: self._nothing + rows.get(part, 0) for part in self.parts}
        self._noted = {part: self._nothing.clone() for part in self.parts}

    def check(self, step: int, ranks: Ranks) -> None:
        """Look at the rows after `step` optimizer steps. A collective, and it waits for the device.

        Raises:
            Diverged: on every rank, if one of them is too long.
        """
        rows = self.rows()
        if not any(rows.values()) and step > self._failed_at:
            self.num_rollbacks = 0  # got past it
        limit = self.config.max_skipped_in_row
        too_long: list[Part] = [part for part in self.parts if limit is not None and rows[part] >= limit]
        if not too_long:
            return
        lines = [self._diagnosis(part, rows[part], step, ranks) for part in too_long]
        final = self.num_rollbacks >= self.config.max_rollbacks
        self.num_rollbacks += 1
        self._failed_at = max(self._failed_at, step)
        raise Diverged("\n".join(lines), final=final)

    def _diagnosis(self, part: Part, row: int, step: int, ranks: Ranks) -> str:
        noted = int(self._noted[part])
        mine: dict[str, list[float]] = {name: value.flatten().tolist() for name, value in self._seen[part].items()}
        everyone = ranks.gather(mine)
        norm = mine["gradient_norm"][0]  # the ranks agree on it
        limit = self.config.max_gradient_norm
        too_large = limit is not None and norm > limit
        return (
            f"{row} updates of the {PART_NAMES[part]} in a row were skipped up to step {step}. In step "
            f"{step - noted + 1}: gradient norm {norm:.4g}"
            + (f", more than guard.max_gradient_norm {limit:g}" if too_large else "")
            + "".join(f"; {line}" for line in self._values(everyone) if line)
        )

    def _values(self, everyone: Sequence[Mapping[str, list[float]]]) -> tuple[str, str]:
        """What was seen: scalars over the global batch, and the timesteps at which a vector was not finite."""
        scalars, timesteps = [], []
        for statistic in self.counted:
            of_ranks = [seen[statistic.name] for seen in everyone if statistic.name in seen]
            if not statistic.label or not of_ranks:
                continue
            if not statistic.by_timestep:
                values = [value for (value,) in of_ranks]
                bad = [str(rank) for rank, value in enumerate(values) if not math.isfinite(value)]
                where = f" (rank {', '.join(bad)})" if bad else ""
                scalars += [f"{statistic.label} {sum(values):.4g}{where}"] if any(values) else []
            else:
                by_timestep = enumerate(zip(*of_ranks, strict=True))
                bad = [str(t) for t, values in by_timestep if not all(map(math.isfinite, values))]
                timesteps += [f"{statistic.label} not finite at t = {', '.join(bad)}"] if bad else []
        finite = "all of D's logits were finite" if "d" in self.parts else "all squared errors were finite"
        return ", ".join(scalars), "; ".join(timesteps) or finite
