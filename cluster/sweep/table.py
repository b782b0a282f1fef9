"""How far each run of a sweep is, with the figures of its newest checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.sweep.combinations import SweepRun
from data.storage.files import read_note, replaced, write_json
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.storage import newest_seen, storage_of
from trainer.config.sections import FIGURES
from trainer.config.train_config import num_steps

TABLE = "sweep.md"
"""File with the table, in the folder of the runs."""
_STOPPED = "stopped-by-asha.json"
_LOSSES = ("loss_g", "loss_d_real", "loss_d_fake")


@dataclass(frozen=True)
class Progress:
    """What the newest checkpoint of a run says.

    Attributes:
        step: optimizer steps done; 0 without a checkpoint.
        images: training images seen.
        metrics: newest values of the curves, and the evaluation of this step if there was one.
        state: finished, stopped by ASHA, or the step that it has come to.
    """

    step: int = 0
    images: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    state: str = "not started"

    @property
    def finished(self) -> bool:
        """Whether all its images were trained on."""
        return self.state == "finished"


def progress_of(run: SweepRun) -> Progress:
    """How far a run is, from its newest checkpoint."""
    try:
        newest = newest_seen(storage_of(run.config))
    except (CheckpointError, OSError):
        newest = None
    if newest is None:
        return Progress()
    batch, state = run.config.training.global_batch_size, f"at step {newest.step}"
    if newest.step >= num_steps(run.config):
        state = "finished"
    elif stopped_by_asha(run):
        state = "stopped by ASHA"
    metrics = {name: value for name, value in newest.manifest.get("metrics", {}).items() if isinstance(value, float)}
    return Progress(newest.step, newest.step * batch, (_figure_at_stop(run) or {}) | metrics, state)


def stopped_by_asha(run: SweepRun) -> bool:
    """Whether --asha has stopped the run, in this call or an earlier one."""
    return _figure_at_stop(run) is not None


def _figure_at_stop(run: SweepRun) -> dict[str, float] | None:
    """The figure by which ASHA has stopped the run; None if it has not."""

    def parse(content: bytes) -> dict[str, float]:
        note = json.loads(content)
        return {str(note["figure"]): float(note["value"])}

    return read_note(run.directory / _STOPPED, parse)


def note_stopped(run: SweepRun, figure: str, value: float, images: int) -> None:
    """Note in the run's directory that ASHA has stopped it."""
    write_json(run.directory / _STOPPED, {"figure": figure, "value": value, "images": images})


def table_of(runs: Sequence[SweepRun]) -> str:
    """The runs as a Markdown table: varied values, state, images, and the newest figures or else the losses."""
    found = [progress_of(run) for run in runs]
    measured = sorted(FIGURES & {name for progress in found for name in progress.metrics})
    curves = [*measured, *_LOSSES]
    heads = [*runs[0].values, "state", "images", *curves]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for run, progress in zip(runs, found, strict=True):
        values = (f"{progress.metrics[name]:.4g}" if name in progress.metrics else "" for name in curves)
        lines.append(f"| {' | '.join([*run.values.values(), progress.state, f'{progress.images:,}', *values])} |")
    return "\n".join(lines)


def write_table(folder: Path, table: str) -> Path:
    """Write the table into the folder of the runs."""
    with replaced(folder / TABLE) as draft:
        draft.write_text(f"{table}\n", encoding="utf-8")
    return folder / TABLE
