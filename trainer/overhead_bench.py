"""What everything around the step costs: `python -m trainer.overhead_bench --config digits`. One rank.

The same steps are timed bare, in this process (data, both updates, optimizer and average, as `trainer.bench`), and as a
user runs them: through Ray Train, with MLflow, the progress bar and checkpoints. The two take turns, so that a machine
that grows slower or faster does so for both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data.storage.location import DataError
from trainer.bench.command import positive
from trainer.bench.measurements import time_rounds
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import ConfigError, load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.tracking.spool import read_records, spool_path

NUM_INTERVALS = 10
"""Intervals between two points of the curves; one more before them warms up."""


def bare_step_s(config: TrainConfig) -> float:
    """Seconds of a step without anything around it."""
    return _step_s([measured["images_per_s"] for measured in time_rounds(config)], config)


def whole_step_s(arguments: Sequence[str], config: TrainConfig) -> float:
    """Seconds of a step of the same config, run by `trainer.run`.

    Raises:
        OSError: the run failed; the message ends with its last lines.
    """
    done = subprocess.run([sys.executable, "-m", "trainer.run", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"trainer.run ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    records = read_records(spool_path(Path(config.run.directory)))
    return _step_s([r.payload["metrics"]["images_per_s"] for r in records if r.kind == "metrics"], config)


def _step_s(images_per_s: Sequence[float], config: TrainConfig) -> float:
    """The mean over all intervals but the first: what a checkpoint holds counts in the interval after it."""
    return config.training.global_batch_size * statistics.mean(1 / rate for rate in images_per_s[1:])


def measure(name: str, overrides: Sequence[str], steps: int, rounds: int, folder: Path) -> list[tuple[float, float]]:
    """Seconds of a step, bare and whole, round after round.

    Args:
        name: of the config.
        overrides: of the user.
        steps: that are timed in a round.
        rounds: how many.
        folder: for the runs; they stay there.

    Raises:
        ConfigError, DataError: the config or its data do not fit.
        OSError: a run failed.
    """
    interval = max(1, steps // NUM_INTERVALS)
    batch = load_config(name, overrides).training.global_batch_size
    total = interval * (NUM_INTERVALS + 1)
    found: list[tuple[float, float]] = []
    for number in range(rounds):
        chosen = [
            "scaling.world_size=1",
            "tracking.backend=mlflow",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"checkpoint.save_interval_steps={total // 2}",
            "grids.interval_steps=null",
            *overrides,
            f"training.total_images={total * batch}",
            f"tracking.log_interval_steps={interval}",
            f"run.directory={folder}/whole-{number}",
        ]
        config = load_config(name, chosen)
        assert num_steps(config) == total
        check_device(config)
        check_data(config)
        bare = bare_step_s(load_config(name, [*chosen, "tracking.backend=none", f"run.directory={folder}/bare"]))
        arguments = ["--config", name, *(word for setting in chosen for word in ("--set", setting))]
        found.append((bare, whole_step_s(arguments, config)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1: a run failed; 2: the arguments, the config or the data are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.overhead_bench", description=(__doc__ or "").partition("\n")[0]
    )
    add_config_arguments(parser)
    parser.add_argument("--steps", type=positive, default=200, help="steps that are timed in a round (200)")
    parser.add_argument("--rounds", type=positive, default=3, help="pairs of runs (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    start_logging(0)
    try:
        with tempfile.TemporaryDirectory(prefix="ddgan-overhead-") as folder:
            pairs = measure(options.config, options.set, options.steps, options.rounds, Path(folder))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    report = {
        "bare_step_s": statistics.median(bare for bare, _ in pairs),
        "whole_step_s": statistics.median(whole for _, whole in pairs),
        "overhead": statistics.median(whole / bare for bare, whole in pairs) - 1,
    }
    print(
        json.dumps(report) if options.json else "\n".join(f"{name:<16} {value:.4g}" for name, value in report.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
