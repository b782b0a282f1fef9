"""The paper's ablation on a small data set: T = 1, 2, 4, 8, with and without z (DDGAN, arXiv 2112.07804).

`python -m trainer.ablation --config digits --out table.md` trains one run per row, one after the other, on one rank
without Ray. It draws samples, evaluates them as `trainer.evaluate` does, and writes a Markdown table. Finished runs are
evaluated again but not trained again; a stopped run resumes.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.shards.index import load_index
from data.storage.arguments import whole_number, whole_numbers
from data.storage.errors import OperationError, UserError, as_command
from data.storage.paths import path_argument
from trainer.checkpoint.format import CheckpointError, list_checkpoints
from trainer.config.command_line import add_config_arguments, check_data, check_device
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.evaluate.classifier import (
    NO_LABELS,
    Evaluation,
    TrainedClassifier,
    evaluate_samples,
    train_classifier,
)
from trainer.evaluate.reference import read_all
from trainer.sample.draw import sample_run

TIMESTEPS = (1, 2, 4, 8)
NUM_SAMPLES = 500
HEADER = (
    "| T | z | seed | distance | of noise's | smallest class | recall | coverage | training |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the table."""

    num_timesteps: int
    latent: bool
    seed: int

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return f"t{self.num_timesteps}-{'z' if self.latent else 'no-z'}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Its settings, as `--set` takes them."""
        return [
            f"diffusion.num_timesteps={self.num_timesteps}",
            f"generator.latent={str(self.latent).lower()}",
            f"run.seed={self.seed}",
        ]

    def row(self, found: Evaluation, seconds: float | None) -> str:
        """Its row of the table; `seconds` of training, None if it was finished before."""
        quality = found.quality
        assert quality is not None
        cells = (
            f"{self.num_timesteps}",
            "yes" if self.latent else "no",
            f"{self.seed}",
            f"{found.frechet_samples:.2f}",
            f"{found.ratio:.3f}",
            f"{min(found.class_shares):.1%}",
            f"{quality.recall:.2f}",
            f"{quality.coverage:.3f}",
            "before" if seconds is None else f"{seconds:.0f} s",
        )
        return f"| {' | '.join(cells)} |"


def cells_of(timesteps: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All runs, in table order."""
    return [
        Cell(num_timesteps=T, latent=latent, seed=seed) for T in timesteps for latent in (True, False) for seed in seeds
    ]


def train(arguments: Sequence[str], config: TrainConfig) -> float | None:
    """Train a run to its end in a subprocess. Returns its seconds, or None if the run was already finished.

    A finished run is started too, so that the worker checks its config. SIGINT and SIGTERM reach the subprocess, which
    saves a checkpoint before it exits.

    Raises:
        ValueError: the run was refused; the worker has printed why.
        OSError: the run failed, and the worker has printed why, or it was stopped.
    """
    was_finished = is_finished(config)
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "trainer.worker", *arguments]) as process:
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sends SIGINT to both processes
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    if code == 2:
        raise UserError(f"the run in {config.run.directory} was refused, see above: fix that, or give another --runs")
    if code or not is_finished(config):
        raise OperationError(
            f"the run in {config.run.directory} exited with code {code} before it was finished: repeat the command to "
            "resume it"
        )
    return None if was_finished else time.perf_counter() - began


def is_finished(config: TrainConfig) -> bool:
    """Whether the run has the checkpoint of its last step."""
    found = list_checkpoints(Path(config.run.directory) / "checkpoints")
    return bool(found) and found[-1].step >= num_steps(config)


def _check(config: TrainConfig) -> None:
    """Refuse unusable settings before anything is trained."""
    check_data(config)
    check_device(config)
    if config.checkpoint.directory is not None:
        raise UserError("checkpoint.directory is set, but each run keeps its checkpoints in --runs: set it to null")
    if load_index(config.data.path).num_classes is None:
        raise UserError(f"{config.data.path}: {NO_LABELS}")


@as_command(name="trainer.ablation", interrupted="stopped; repeat the command to resume the current run")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1: a run failed or was stopped; 2: arguments, config or data are wrong; 130: Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.ablation", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--timesteps", type=whole_numbers, default=list(TIMESTEPS), metavar="1,2", help="default: 1,2,4,8"
    )
    parser.add_argument("--seeds", type=whole_numbers, default=[0], metavar="0,1", help="default: 0")
    parser.add_argument(
        "--num", type=whole_number(2), default=NUM_SAMPLES, help=f"samples per run (default: {NUM_SAMPLES})"
    )
    parser.add_argument("--runs", type=path_argument, default=Path("runs/ablation"), help="folder for the runs")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE.md", help="file for the table")
    options = parser.parse_args(arguments)
    fixed = ["scaling.world_size=1", "tracking.backends=[]", *options.set]
    plans = []
    for cell in cells_of(options.timesteps, options.seeds):
        overrides = [*fixed, *cell.overrides, f"run.directory={options.runs / cell.name}"]
        plans.append((cell, overrides, load_config(options.config, overrides)))
    first = plans[0][2]
    _check(first)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    reference, labels = read_all(first.data.path)
    assert labels is not None  # the index says so
    classifier: TrainedClassifier | None = None
    lines = [HEADER]
    for cell, overrides, config in plans:
        words = [word for text in overrides for word in ("--set", text)]
        seconds = train(["--config", options.config, *words], config)
        try:
            samples = sample_run(Path(config.run.directory), options.num, seed=0)
        except CheckpointError as error:
            raise UserError(str(error)) from error
        classifier = classifier or train_classifier(reference, labels, seed=0)
        lines.append(cell.row(evaluate_samples(samples, reference, labels, 0, classifier=classifier), seconds))
        sys.stdout.write(f"{lines[-1]}\n")
        options.out.write_text("\n".join(lines) + "\n")  # after each run, so that an interruption loses no row
    return 0


if __name__ == "__main__":
    sys.exit(main())
