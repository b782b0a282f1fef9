"""A trace of chosen steps for Perfetto (ui.perfetto.dev) or chrome://tracing, and a GPU's memory meanwhile."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data.storage.files import replaced

log = logging.getLogger(__name__)

NAMES: Mapping[str, str] = {"d": "update D", "g": "update G"}
"""Names of phases in the trace; the others keep their own."""
MAX_ALLOCATIONS = 100_000
"""Events that the memory snapshot keeps: the last ones, some tens of MB."""


class StepProfile:
    """Traces steps `first` to `last`, counted from 1, of one rank.

    It watches the phases that the rank enters: each step and each of its phases becomes a named range of the trace.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device) -> None:
        """Prepare; nothing is traced before the first of the steps.

        Args:
            steps: first and last; None: none at all.
            folder: where the files are written; made when they are.
            rank: of this process, part of the files' names.
            device: where it computes.
        """
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._next: int | None = None
        self._first = 0
        self._profile: profile | None = None
        self._step, self._phase = ExitStack(), ExitStack()

    @property
    def last(self) -> int | None:
        """The last step that is traced."""
        return self._steps[1] if self._steps else None

    def begin(self, step: int) -> None:
        """Note that `step` steps are done and that the next ones begin: at a start, or where the run goes on."""
        self.close()  # a run that has gone back to a checkpoint would be traced for longer than it was asked for
        self._next = step + 1
        if self._steps and self._rank == 0 and self._steps[0] <= step:
            first, last = self._steps
            left = f"only steps {step + 1} to {last} are" if step < last else "none of them is"
            log.info("tracking.profile_steps is %d to %d, and step %d is done: %s profiled", first, last, step, left)

    def enter(self, phase: str) -> None:
        """Note that the rank enters a phase; `data` is the first one of each step."""
        if self._steps is None or self._next is None:
            return
        if phase == "data":
            self._begin_step(*self._steps)
        if self._profile:
            self._phase.close()
            self._phase.enter_context(record_function(NAMES.get(phase, phase)))

    def _begin_step(self, first: int, last: int) -> None:
        assert self._next is not None
        number, self._next = self._next, self._next + 1
        if self._profile is None and first <= number <= last:
            self._open(number)
        if self._profile:
            self._leave_ranges()
            self._step.enter_context(record_function(f"step {number}"))

    def end_step(self) -> None:
        """Note that the step is done."""
        if self._profile:
            self._leave_ranges()

    def close(self) -> None:
        """Write what has been traced; a disk that does not take it is told and costs nothing else."""
        if self._profile is None or self._next is None:
            return
        self._leave_ranges()
        traced, self._profile = self._profile, None
        traced.stop()
        name = f"rank-{self._rank}-steps-{self._first}-{self._next - 1}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"{name}.json.gz"
            with replaced(trace, draft=f"{name}.unfinished.json.gz") as draft:
                traced.export_chrome_trace(str(draft))
            log.info("%s: %.1f MB, for https://ui.perfetto.dev", trace, trace.stat().st_size / 1e6)
            if self._device.type == "cuda":
                with replaced(self._folder / f"{name}-memory.pickle") as draft:
                    torch.cuda.memory._dump_snapshot(str(draft))
        except OSError as error:
            log.error("the profile of rank %d was not written, training continues: %s", self._rank, error)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _open(self, number: int) -> None:
        self._first = number
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")
        self._profile = profile(activities=activities)
        self._profile.start()

    def _leave_ranges(self) -> None:
        self._phase.close()
        self._step.close()
