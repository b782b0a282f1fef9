"""Updates skipped one after the other: counted and kept on the device, read where the curves are logged.

A healthy run passes by unchanged. One whose last `guard.max_skipped_in_row` updates of a network were skipped goes back
to its last checkpoint; where that does not help, it ends and says what it has seen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from data.storage.errors import OperationError
from trainer.algorithm.step import Statistics
from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks

Player = Literal["d", "g"]


NAMES: dict[Player, str] = {"d": "discriminator", "g": "generator"}


DIAGNOSTIC = frozenset({"logits_g"})
"""Statistics that no curve shows."""


_ADVICE = (
    "Data and draws are functions of the seed and the step, so what comes back at the same step is of the run itself, "
    "not of a machine that failed for a moment. If one rank alone is named, look at its device and data. Otherwise "
    "start anew with a lower training.learning_rate_d.peak or learning_rate_g.peak, a larger training.r1_gamma or "
    "training.adam.eps, or training.precision=fp32; run.init_from takes the weights of an earlier snapshot. guard.* "
    "and scaling.* may be changed for this run as well"
)


class DivergenceError(OperationError):
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
    """Follows both networks' updates.

    Attributes:
        config: the limits.
        device: where the updates are made.
        world_size: ranks that count the same updates.
        num_rollbacks: how often the run went back because of steps that it has not yet got past.
    """

    config: GuardConfig
    device: torch.device
    world_size: int = 1
    num_rollbacks: int = 0

    def __post_init__(self) -> None:
        self._nothing = torch.zeros((), device=self.device)
        self._seen: dict[Player, Statistics] = {player: {} for player in NAMES}
        self._failed_at = 0
        self.load_rows({})

    def take_in(self, player: Player, guard: UpdateGuard, statistics: Statistics) -> Statistics:
        """Note one update of `player`; reads nothing off the device.

        Returns:
            `statistics` for the curves, zero if the update was skipped, and this rank's share of the number of skipped
            updates: those of all ranks sum to 0 or 1.
        """
        skipped, nothing, before = guard.skipped > 0, self._nothing, self._seen[player]
        now = {"gradient_norm": guard.norm, **statistics}
        # The first of a row is the one to look at: what comes after it may be its consequence. A value that the update
        # does not have, as R1 in most steps, is zero.
        first = skipped & (self._noted[player] == 0)
        self._seen[player] = {
            name: torch.where(first, now.get(name, nothing), before.get(name, nothing)) for name in now | before
        }
        for counts in (self._rows, self._noted):
            counts[player] = (counts[player] + 1) * guard.skipped
        kept = {
            name: torch.where(skipped, torch.zeros_like(value), value)
            for name, value in statistics.items()
            if name not in DIAGNOSTIC
        }
        return {**kept, f"skipped_updates_{player}": guard.skipped / self.world_size}

    def rows(self) -> dict[str, int]:
        """Updates skipped in a row up to now, by player; for the manifest. Waits for the device."""
        return {player: int(row) for player, row in self._rows.items()}

    def load_rows(self, rows: Mapping[str, int]) -> None:
        """Go on from the rows of a checkpoint. What they looked like is not known any more."""
        self._rows = {player: self._nothing + rows.get(player, 0) for player in NAMES}
        self._noted = {player: self._nothing.clone() for player in NAMES}

    def check(self, step: int, ranks: Ranks) -> None:
        """Look at the rows after `step` optimizer steps. A collective, and it waits for the device.

        Raises:
            Diverged: on every rank, if one of them is too long.
        """
        rows = self.rows()
        if not any(rows.values()) and step > self._failed_at:
            self.num_rollbacks = 0  # got past it
        limit = self.config.max_skipped_in_row
        long: list[Player] = [player for player in NAMES if limit is not None and rows[player] >= limit]
        if not long:
            return
        lines = [self._diagnosis(player, rows[player], step, ranks) for player in long]
        final = self.num_rollbacks >= self.config.max_rollbacks
        self.num_rollbacks += 1
        self._failed_at = max(self._failed_at, step)
        raise Diverged("\n".join(lines), final=final)

    def _diagnosis(self, player: Player, row: int, step: int, ranks: Ranks) -> str:
        noted = int(self._noted[player])
        mine: dict[str, list[float]] = {name: value.flatten().tolist() for name, value in self._seen[player].items()}
        everyone = ranks.gather(mine)
        norm = mine["gradient_norm"][0]  # the ranks agree on it
        limit = self.config.max_gradient_norm
        too_large = limit is not None and norm > limit
        return (
            f"{row} updates of the {NAMES[player]} in a row were skipped up to step {step}. In step "
            f"{step - noted + 1}: gradient norm {norm:.4g}"
            + (f", more than guard.max_gradient_norm {limit:g}" if too_large else "")
            + "".join(f"; {line}" for line in (_losses(everyone), _timesteps(everyone)) if line)
        )


def _losses(everyone: Sequence[Mapping[str, list[float]]]) -> str:
    """Each loss over the global batch; for one that is not finite, the ranks where it is not."""
    found: list[str] = []
    for name in ("loss_d", "loss_d_real", "loss_d_fake", "r1_penalty", "r2_penalty", "loss_g"):
        values = [seen[name][0] for seen in everyone if name in seen]
        if values and any(values):
            bad = [str(rank) for rank, value in enumerate(values) if not math.isfinite(value)]
            found.append(f"{name} {sum(values):.4g}" + (f" (rank {', '.join(bad)})" if bad else ""))
    return ", ".join(found)


def _timesteps(everyone: Sequence[Mapping[str, list[float]]]) -> str:
    """The timesteps at which the discriminator's answers were not finite."""
    found: list[str] = []
    for name, kind in (("logits_real", "real"), ("logits_fake", "fake"), ("logits_g", "generated")):
        rows = [seen[name] for seen in everyone if name in seen]
        bad = [str(t) for t, values in enumerate(zip(*rows, strict=True)) if not all(map(math.isfinite, values))]
        if bad:
            found.append(f"logits of {kind} pairs not finite at t = {', '.join(bad)}")
    return "; ".join(found) or "all of D's logits were finite"
