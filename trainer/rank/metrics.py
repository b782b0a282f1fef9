"""The values of the curves: statistics of the steps between two log points, kept on the device until logged."""

import resource
import sys
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.algorithm.statistics import Statistic, Statistics
from trainer.engine.ranks import Ranks

MAX_TIMESTEP_CURVES = 16
"""With more timesteps than this, as usual for the gaussian method, there are no curves per timestep."""
_REPLACED = "replaced_samples"


class StatisticsSum:
    """Sums of the steps' statistics since the last log point. Checkpoints keep them, so a resumed run logs the same."""

    def __init__(self, declared: Iterable[Statistic]) -> None:
        """Start at zero.

        Args:
            declared: every statistic that can be added.
        """
        self._declared = {statistic.name: statistic for statistic in declared}
        self._sums: Statistics = {}
        self._replaced_samples = 0

    def add(self, statistics: Statistics) -> None:
        """Add one update's statistics."""
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def count_replaced(self, samples: int) -> None:
        """Add to the number of bad samples that were replaced; counted on the host, where they are found."""
        self._replaced_samples += samples

    def state(self) -> dict[str, Tensor]:
        """This rank's sums."""
        replaced = {_REPLACED: torch.tensor(float(self._replaced_samples))} if self._replaced_samples else {}
        return {**self._sums, **replaced}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Load this rank's sums from a checkpoint.

        Sums from a version with other statistics are dropped: the next log point covers only the steps since the start.
        """
        replaced = state.get(_REPLACED, torch.tensor(0.0))
        self._replaced_samples = int(replaced.sum().item()) if replaced.isfinite().all() else 0
        sums = {name: value.to(device) for name, value in state.items() if name != _REPLACED}
        known = all(name in self._declared and (self._declared[name].over or name) in sums for name in sums)
        self._sums = sums if known else {}

    def take(self, ranks: Ranks, of_ranks: Tensor | None = None) -> dict[str, float]:
        """The curves over all steps and ranks since the last call; clears the sums. A collective and a device sync.

        Each statistic becomes a curve as declared. A vector becomes one curve per timestep, `NAME/t0` and so on, unless
        there are too many timesteps. A mean over zero updates is left out. `replaced_samples` is a sum.

        Args:
            ranks: the ranks that call this.
            of_ranks: [R, K] float64, in which this rank has filled its own row and left the others 0. It gets the rows
                of all ranks, in the same collective.
        """
        names = sorted(self._sums)
        sizes = [self._sums[name].numel() for name in names]
        flat = torch.cat([self._sums[name].reshape(-1) for name in names]).cpu().double()
        flat = torch.cat([flat, torch.tensor([self._replaced_samples], dtype=flat.dtype)])
        of_ranks = flat.new_zeros(0) if of_ranks is None else of_ranks
        *parts, replaced, rows = ranks.sum(torch.cat([flat, of_ranks.flatten()])).split([*sizes, 1, of_ranks.numel()])
        of_ranks.copy_(rows.view_as(of_ranks))
        sums = dict(zip(names, parts, strict=True))
        self._sums, self._replaced_samples = {}, 0
        values = {_REPLACED: replaced.item()}
        for name, total in sums.items():
            values |= self._curves(self._declared[name], total, sums)
        return values

    def _curves(self, statistic: Statistic, total: Tensor, sums: Statistics) -> dict[str, float]:
        if statistic.curve is None:
            return {}
        if statistic.over is None:
            return {statistic.curve: total.sum().round().item()}
        counted = sums[statistic.over]
        if not statistic.by_timestep:
            # For each update, the shares of all ranks and micro-batches sum to 1 up to rounding.
            updates = counted.sum().round()
            return {statistic.curve: (total.sum() / updates).item()} if updates else {}
        if len(total) > MAX_TIMESTEP_CURVES:
            return {}
        by_timestep = enumerate((total / counted).tolist())
        return {f"{statistic.curve}/t{t}": value for t, value in by_timestep if value == value}


class StepClock:
    """Splits the time of the steps into named parts. On a GPU it uses events, which are read only in `take`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.start()

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Reset all times and start timing."""
        self._began = time.perf_counter()
        self._marks = [("", self._now())]
        self._steps = 0

    def mark(self, part: str) -> None:
        """Assign the time since the last mark to `part`."""
        self._marks.append((part, self._now()))

    def end_step(self, part: str) -> None:
        """Set the last mark of a step."""
        self.mark(part)
        self._steps += 1

    def take(self) -> tuple[float, dict[str, float], int]:
        """(wall seconds, seconds of each part, steps) since the last call; resets the clock. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        split: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                seconds = before.elapsed_time(after) / 1000.0
            else:
                assert isinstance(before, float) and isinstance(after, float)
                seconds = after - before
            split[part] = split.get(part, 0.0) + seconds
        wall, steps = time.perf_counter() - self._began, self._steps
        self.start()
        return wall, split, steps


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: torch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
