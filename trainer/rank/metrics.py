"""What the curves show: statistics of the steps between two log points, kept on the device until then."""

import resource
import sys
import time

import torch
from torch import Tensor

from trainer.algorithm.step import Statistics
from trainer.engine.ranks import Ranks

MAX_TIMESTEP_CURVES = 16
"""With more timesteps, as objective gaussian has, no curve is drawn of each."""


_REPLACED = "replaced_samples"


class StatisticsSum:
    """Sums of the steps' statistics since the last log point; checkpoints keep them, so a resumed run logs the same."""

    def __init__(self) -> None:
        self._sums: Statistics = {}
        self._replaced_samples = 0

    def add(self, statistics: Statistics) -> None:
        """Take in one update's statistics."""
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def count_replaced(self, samples: int) -> None:
        """Take in bad samples that others stood in for; counted on the host, where they are found."""
        self._replaced_samples += samples

    def state(self) -> dict[str, Tensor]:
        """This rank's sums."""
        replaced = {_REPLACED: torch.tensor(float(self._replaced_samples))} if self._replaced_samples else {}
        return {**self._sums, **replaced}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take this rank's sums from a checkpoint."""
        self._replaced_samples = int(state.get(_REPLACED, torch.tensor(0.0)).item())
        self._sums = {name: value.to(device) for name, value in state.items() if name != _REPLACED}

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Means over steps and ranks since the last call, as floats; clears the sums. A collective, and a device sync.

        `logit_real/t0` is the mean of D's logits over the real pairs whose timestep was 0, and so on where timesteps
        are few; `r1` and `r2` are averaged over the steps that computed them. `replaced_samples`, and the two
        `skipped_updates`, are sums. A mean without any step behind it is left out.
        """
        names = sorted(self._sums)
        sizes = [self._sums[name].numel() for name in names]
        flat = torch.cat([self._sums[name].reshape(-1) for name in names]).cpu().double()
        flat = torch.cat([flat, torch.tensor([self._replaced_samples], dtype=flat.dtype)])
        *parts, replaced = ranks.sum(flat).split([*sizes, 1])
        sums = dict(zip(names, parts, strict=True))
        self._sums, self._replaced_samples = {}, 0
        none = torch.zeros((), dtype=flat.dtype)
        skipped_d, skipped_g = (sums.get(f"skipped_updates_{p}", none).sum().round() for p in "dg")
        # The frequencies of one step sum to 1; of a skipped one, to 0. They are D's, or G's where there is no D.
        updates_d = sums["frequency_t"].sum().round()
        updates_g = updates_d if "errors" in sums else updates_d + skipped_d - skipped_g
        losses = [name for name in names if name.startswith("loss_")]
        counts = {name: updates_g if name == "loss_g" else updates_d for name in losses}
        means = {name: (sums[name] / count).item() for name, count in counts.items() if count}
        means |= {"skipped_updates_d": skipped_d.item(), "skipped_updates_g": skipped_g.item()}
        means[_REPLACED] = replaced.item()
        for penalty in ("r1", "r2"):
            if sums.get(f"{penalty}_steps"):
                means[penalty] = (sums[f"{penalty}_penalty"] / sums[f"{penalty}_steps"]).item()
        curves = {"logits_real": "logit_real", "logits_fake": "logit_fake", "errors": "squared_error"}
        for name in sorted(curves.keys() & sums.keys()):
            by_timestep = (sums[name] / sums["frequency_t"]).tolist()
            if len(by_timestep) <= MAX_TIMESTEP_CURVES:
                means |= {f"{curves[name]}/t{t}": value for t, value in enumerate(by_timestep) if value == value}
        return means


class StepClock:
    """Splits the time of the steps into named parts: on a GPU by events, read only when the split is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._start()

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self) -> None:
        self._began = time.perf_counter()
        self._marks = [("", self._now())]
        self._steps = 0

    def mark(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        self._marks.append((part, self._now()))

    def end_step(self, part: str) -> None:
        """The last mark of a step."""
        self.mark(part)
        self._steps += 1

    def take(self) -> tuple[float, dict[str, float], int]:
        """Wall seconds, seconds of each part, and steps since the last call; starts anew. Waits for the device."""
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
        self._start()
        return wall, split, steps


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: of torch on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
