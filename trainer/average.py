"""Average a generator's weights over another width after its run: `python -m trainer.average --run DIR --width 0.07`.

The run must have kept averages by power functions (`training.power_ema`). Of these, the nearest combination is taken
(Karras et al., 2312.02696, section 3.2), and written as a snapshot, which `trainer.sample`, `trainer.evaluate` and
`run.init_from` take.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from trainer.algorithm.ema import MAX_WIDTH, MIN_WIDTH, coefficients_for
from trainer.checkpoint.snapshot import CONFIG, WeightsError, averages_folder, save_snapshot
from trainer.config.io import load_stored
from trainer.config.train_config import TrainConfig

log = logging.getLogger(__name__)

FAR = 0.05
"""Relative distance from the wanted profile above which a warning is given."""


@dataclass(frozen=True)
class SavedAverage:
    """One average on disk.

    Attributes:
        file: its weights.
        width: of its power function.
        first_step: step of the run with which its stage began.
        step: last step of the run that it covers.
    """

    file: Path
    width: float
    first_step: int
    step: int

    @property
    def num_steps(self) -> int:
        """Steps that it averages."""
        return self.step - self.first_step


@dataclass(frozen=True)
class Combined:
    """An average made from others.

    Attributes:
        state: the generator's whole state.
        config: builds the generator.
        step: last step that it covers.
        num_used: number of averages that it was made from.
        distance: of its weights' profile from the wanted one, relative to the latter's length.
    """

    state: dict[str, Tensor]
    config: TrainConfig
    step: int
    num_used: int
    distance: float


def saved_averages(run: Path) -> list[SavedAverage]:
    """The averages of a run, oldest first.

    Raises:
        WeightsError: a file is none.
    """
    return sorted(map(_read, averages_folder(run).glob("step-*/width-*.safetensors")), key=lambda a: (a.step, a.width))


def _read(file: Path) -> SavedAverage:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return SavedAverage(file, float(metadata["width"]), int(metadata["first_step"]), int(metadata["step"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(
            f"{file} cannot be read as an average ({error}): move it away, the other averages may suffice"
        ) from error


def combined(run: Path, width: float, step: int | None = None) -> Combined:
    """The average of any width at a step, from those that the run has left up to it.

    Args:
        run: its directory.
        width: of the average to be made.
        step: last step that it covers; None: the newest.

    Raises:
        UserError: the run has left none, or none of this step.
        WeightsError: a file is damaged.
    """
    found = saved_averages(run)
    if not found:
        raise UserError(
            f"{averages_folder(run)} holds no averages: train with training.power_ema.widths, such as [0.05, 0.1]"
        )
    steps = sorted({average.step for average in found})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"there is no average of step {step}; there are those of {', '.join(map(str, steps))}")
    last = next(average for average in found if average.step == step)
    used = [average for average in found if average.step <= step and average.first_step == last.first_step]
    factors, distance = coefficients_for([(a.width, a.num_steps) for a in used], (width, last.num_steps))
    state = _sum_of([average.file for average in used], factors.tolist())
    return Combined(state, load_stored(last.file.with_name(CONFIG)), step, len(used), distance)


def _sum_of(files: Sequence[Path], factors: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of weights files in float64, one tensor at a time, as float32."""
    total: dict[str, Tensor] = {}
    for file, factor in zip(files, factors, strict=True):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    value = opened.get_tensor(name).to(torch.float64)
                    total[name] = total[name] + factor * value if name in total else factor * value
        except (OSError, SafetensorError, RuntimeError) as error:
            raise WeightsError(f"{file} cannot be read: {error}") from error
    return {name: value.to(torch.float32) for name, value in total.items()}


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.average", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=path_argument, required=True, help="directory of the run")
    parser.add_argument("--width", type=width_argument, required=True, help=f"from {MIN_WIDTH:g} to {MAX_WIDTH:g}")
    parser.add_argument("--step", type=whole_number(1), help="last step of the average; default: the newest there is")
    parser.add_argument("--out", type=path_argument, help="folder of the snapshot; default: in the run's snapshots")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    made = combined(options.run, options.width, options.step)
    out = options.out or Path(options.run) / "snapshots" / f"step-{made.step:08d}-width-{options.width:g}"
    if out.exists():
        raise UserError(f"{out} exists: give another --out, or move it away")
    if made.distance > FAR:
        log.warning(
            "the averages that there are come no nearer to width %g than %.0f%%: write more of them "
            "(training.power_ema.interval_images), or take a width between those of training.power_ema.widths",
            options.width,
            100 * made.distance,
        )
    save_snapshot(out, made.state, made.config, made.step)
    print(f"width {options.width:g} at step {made.step}, from {made.num_used} averages: {out}")
    return 0


def width_argument(text: str) -> float:
    """The width of an average, an argument of a command."""
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise argparse.ArgumentTypeError(
            f"{text} is not a width; allowed: {MIN_WIDTH:g} to {MAX_WIDTH:g}, such as 0.07"
        )
    return width


if __name__ == "__main__":
    sys.exit(main())
