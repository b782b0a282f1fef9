"""The cost of everything around the step, on one rank.

The same steps are timed bare, in this process (data, both updates, optimizer and average), and as a user runs them:
through Ray Train, with MLflow, the progress bar and checkpoints. The two alternate, so that a machine whose speed
changes affects both.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.storage.errors import OperationError
from trainer.bench.steps.timing import Report, time_rounds
from trainer.config.command_line import check_data, check_device
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.tracking.spool import read_records, spool_path

NUM_INTERVALS = 10
"""Intervals between points of the curves, after one for warm-up."""


def bare_step_s(config: TrainConfig) -> float:
    """Seconds per step with nothing around it."""
    return _step_s([measured["images_per_s"] for measured in time_rounds(config)], config)


def whole_step_s(arguments: Sequence[str], config: TrainConfig) -> float:
    """Seconds per step of the same config, run by `trainer.run`.

    Raises:
        OperationError: the run failed; the message ends with its last lines.
    """
    done = subprocess.run([sys.executable, "-m", "trainer.run", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OperationError(f"trainer.run ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    records = read_records(spool_path(Path(config.run.directory)))
    return _step_s([r.payload["metrics"]["images_per_s"] for r in records if r.kind == "metrics"], config)


def _step_s(images_per_s: Sequence[float], config: TrainConfig) -> float:
    """Mean over all intervals except the first; a checkpoint's blocking time counts in the interval after it."""
    return config.training.global_batch_size * statistics.mean(1 / rate for rate in images_per_s[1:])


def time_pairs(name: str, overrides: Sequence[str], steps: int, rounds: int, folder: Path) -> list[tuple[float, float]]:
    """Seconds per step, bare and whole, for each round.

    Args:
        name: config name.
        overrides: the user's.
        steps: timed steps per round.
        rounds: number of rounds.
        folder: for the runs; not deleted.

    Raises:
        ConfigError, DataError: the config or its data are wrong.
        OperationError: a run failed.
    """
    interval = max(1, steps // NUM_INTERVALS)
    batch = load_config(name, overrides).training.global_batch_size
    total = interval * (NUM_INTERVALS + 1)
    found: list[tuple[float, float]] = []
    for number in range(rounds):
        chosen = [
            "scaling.world_size=1",
            "tracking.backends=[mlflow]",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"checkpoint.save_interval_steps={total // 2}",
            "grids.interval_steps=null",
            *overrides,
            "stages={}",  # the last stage alone
            *(f"training.learning_rate_{part}.{name}_images=0" for part in "gd" for name in ("warmup", "delay")),
            "tracking.register_as=null",
            f"training.total_images={total * batch}",
            f"tracking.log_interval_steps={interval}",
            f"run.directory={folder}/whole-{number}",
        ]
        config = load_config(name, chosen)
        assert num_steps(config) == total
        check_device(config)
        check_data(config)
        bare = bare_step_s(load_config(name, [*chosen, "tracking.backends=[]", f"run.directory={folder}/bare"]))
        arguments = ["--config", name, *(word for setting in chosen for word in ("--set", setting))]
        found.append((bare, whole_step_s(arguments, config)))
    return found


def summarize(pairs: Sequence[tuple[float, float]]) -> Report:
    """Medians over rounds.

    Args:
        pairs: seconds per step, bare and whole, of each round.

    Returns:
        bare_step_s and whole_step_s; overhead, the extra time of the whole step as a fraction of the bare step.
    """
    return {
        "bare_step_s": statistics.median(bare for bare, _ in pairs),
        "whole_step_s": statistics.median(whole for _, whole in pairs),
        "overhead": statistics.median(whole / bare for bare, whole in pairs) - 1,
    }
