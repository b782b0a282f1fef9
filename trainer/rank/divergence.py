"""Notices training that leads nowhere: updates skipped in a row, and a discriminator that learns nothing.

Skipped updates are counted on the device and read when the curves are logged. If the last `guard.max_skipped_in_row`
updates of a network were skipped, the run goes back to its last checkpoint. If that does not help, it ends with a
diagnosis. A healthy run is not affected.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data.storage.errors import OperationError
from trainer.algorithm.method import PART_NAMES, Part
from trainer.algorithm.statistics import Statistic, Statistics, total
from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks

log = logging.getLogger(__name__)

_ADVICE = (
    "Data and random numbers depend only on the seed and the step, so a failure that comes back at the same step is "
    "caused by the run, not by a transient fault of a machine. If only one rank is named, check its device and data. "
    "Otherwise start a new run with a lower training.learning_rate_d.peak or learning_rate_g.peak, a larger "
    "training.r1_gamma or training.adam.eps, or training.precision=fp32; run.init_from loads the weights of an earlier "
    "snapshot. For this run, you can change guard.* and scaling.*"
)


class DivergenceError(OperationError):
    """The run cannot continue: its updates keep being skipped. The message has a diagnosis and advice."""


class Diverged(Exception):  # noqa: N818 - not an error as long as the run can go back
    """Raised on all ranks at a log point if a network's last updates were all skipped.

    Attributes:
        final: the run has used up its rollbacks.
    """

    def __init__(self, diagnosis: str, *, final: bool) -> None:
        super().__init__(diagnosis)
        self.final = final

    def error(self, reason: str) -> DivergenceError:
        """The error that ends the run, for `reason`."""
        return DivergenceError(f"{self}\nThe run ends: {reason}. {_ADVICE}")


@dataclass
class SkippedUpdates:
    """Counts skipped updates of the trained networks.

    Attributes:
        config: the limits.
        device: where the updates are made.
        parts: the trained networks.
        counted: statistics of their updates.
        world_size: number of ranks, which all count the same updates.
        num_rollbacks: rollbacks so far because of steps that the run has not passed yet.
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
        """The additional statistics: the number of skipped updates of each network."""
        return tuple(total(f"skipped_updates_{part}") for part in self.parts)

    def take_in(self, part: Part, guard: UpdateGuard, statistics: Statistics) -> Statistics:
        """Record one update of `part`; reads nothing off the device.

        Returns:
            `statistics` for the curves, set to zero if the update was skipped, and this rank's share of the number of
            skipped updates: the shares of all ranks sum to 0 or 1.
        """
        skipped, nothing, before = guard.skipped > 0, self._nothing, self._seen[part]
        now = {"gradient_norm": guard.norm, **statistics}
        # Keep the first update of a row: later ones may only be its consequence. A statistic that this update does not
        # have, such as R1 in most steps, is zero.
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
        """Number of updates skipped in a row so far, by network, for the manifest. Waits for the device."""
        return {part: int(row) for part, row in self._rows.items()}

    def load_rows(self, rows: Mapping[str, int]) -> None:
        """Continue counting from a checkpoint's rows. Their statistics are not in the checkpoint."""
        self._rows = {part: self._nothing + rows.get(part, 0) for part in self.parts}
        self._noted = {part: self._nothing.clone() for part in self.parts}

    def check(self, step: int, ranks: Ranks) -> None:
        """Check the rows after `step` optimizer steps. A collective that waits for the device.

        Raises:
            Diverged: on every rank, if a row has reached guard.max_skipped_in_row.
        """
        rows = self.rows()
        if not any(rows.values()) and step > self._failed_at:
            self.num_rollbacks = 0  # the run has passed the failing steps
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
        norm = mine["gradient_norm"][0]  # the same on all ranks
        limit = self.config.max_gradient_norm
        too_large = limit is not None and norm > limit
        return (
            f"{row} updates of the {PART_NAMES[part]} in a row were skipped up to step {step}. In step "
            f"{step - noted + 1}: gradient norm {norm:.4g}"
            + (f", more than guard.max_gradient_norm {limit:g}" if too_large else "")
            + "".join(f"; {line}" for line in self._values(everyone) if line)
        )

    def _values(self, everyone: Sequence[Mapping[str, list[float]]]) -> tuple[str, str]:
        """The recorded statistics as text: scalars over the global batch, and timesteps with non-finite values."""
        scalars, timesteps, finite = [], [], []
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
                finite += [] if bad else [statistic.label]
        return ", ".join(scalars), "; ".join(timesteps) or f"finite at every t: {', '.join(finite)}"


class LogitGap:
    """Warns, once, if D's logits for real and for fake pairs have not parted since the start of the stage.

    D then knows nothing that it could teach G, whatever the samples look like. Only the start is judged: late in a good
    run the fakes are so good that the logits meet again.

    Args:
        num_steps: steps after which the warning is due.
        gap: the logits have parted once their means differ by this much at some timestep.
    """

    def __init__(self, num_steps: int = 500, gap: float = 0.1) -> None:
        self._num_steps, self._gap = num_steps, gap
        self._last_step = 0
        self._watching = True

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the means since the last log point.

        Args:
            step: optimizer steps of the stage that are done.
            metrics: has `logit_real/t0`, `logit_fake/t0`, ...; without them, nothing is checked.
        """
        resumed = not self._last_step and step > self._num_steps
        gaps = [abs(v - metrics[k.replace("real", "fake")]) for k, v in metrics.items() if k.startswith("logit_real/")]
        if resumed or not gaps or max(gaps) >= self._gap:
            self._watching = False
        self._last_step = step
        if self._watching and step >= self._num_steps:
            self._watching = False
            log.warning(
                "D has not told real from generated images in the first %d steps: the means of its logits differ by "
                "less than %g at every timestep (curves logit_real and logit_fake), so G learns nothing from it. "
                "training.objective=relativistic, whose loss does not depend on what both logits share, parted them "
                "where smaller penalties, other learning rates and a wider discriminator did not",
                step,
                self._gap,
            )
