"""Prove that kills do not change the result: `python -m trainer.verify_resume --config digits --kills 10 --ranks 2`.

Trains twice without Ray: once uninterrupted, and once killed at points chosen by a seed (in a step, during a file
operation of a checkpoint, by SIGTERM) and restarted until it is done. Then compares every checkpoint of the two runs.
Exit codes: 0, all equal; 1, something differs, or a start failed without a kill; 2, the command or the config is wrong.
"""

import argparse
import logging
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.storage.arguments import whole_number
from data.storage.errors import OperationError, as_command
from data.storage.paths import path_argument
from trainer.checkpoint.fingerprint import Fingerprint, fingerprint
from trainer.checkpoint.format import list_checkpoints, newest_valid
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.driver.forked_ranks import load_before_forking, run_group
from trainer.rank import fault_injection
from trainer.rank.fault_injection import MARK, Kill

log = logging.getLogger(__name__)

KINDS = ("step", "checkpoint", "SIGTERM", "checkpoint", "step")
FILE_EVENTS_OF_A_SAVE = 10
"""Approximate number of file operations in a save on rank 0; on other ranks it is `FILE_EVENTS_OF_A_PART`."""
FILE_EVENTS_OF_A_PART = 3
NUM_CHECKPOINTS = 20


class StartFailedError(OperationError):
    """A start failed, but not because of a kill."""


@dataclass(frozen=True)
class Trial:
    """What is trained, and where.

    Attributes:
        arguments: the worker's arguments, without a run directory.
        config: the resolved config.
        ranks: number of processes.
        out: folder of all runs and logs.
    """

    arguments: list[str]
    config: TrainConfig
    ranks: int
    out: Path

    def start(self, name: str, kill: Kill | None) -> bool:
        """Start or resume the run `name`, until its end or until the kill.

        Returns:
            Whether the kill took effect.

        Raises:
            StartFailedError: it failed without a kill; the message ends with the last lines of the log.
        """
        arguments = [*self.arguments, "--set", f"run.directory={self.out / name}"]
        arguments += ["--kill", kill.to_json()] if kill else []
        file = self.out / f"{name}.log"
        before = file.stat().st_size if file.exists() else 0
        code = run_group(self.ranks, fault_injection.main, arguments, log=file)
        printed = file.read_bytes()[before:].decode(errors="replace")
        killed = MARK in printed
        if code and not (killed and kill and kill.signal == "SIGKILL"):
            raise StartFailedError(f"a start of {name} exited with code {code}; {file} ends:\n{printed[-2000:]}")
        return killed

    def checkpoints(self, name: str) -> Path:
        """Checkpoint folder of the run `name`."""
        return self.out / name / "checkpoints"

    def step(self, name: str) -> int:
        """Step at which the run `name` would resume."""
        newest = newest_valid(self.checkpoints(name))
        return newest.step if newest else 0

    def fingerprints(self, name: str) -> dict[int, Fingerprint]:
        """Fingerprint of every checkpoint of the run `name`, by step."""
        return {checkpoint.step: fingerprint(checkpoint) for checkpoint in list_checkpoints(self.checkpoints(name))}


def plan_kills(seed: int, kills: int, *, ranks: int, total_steps: int) -> Iterator[Kill]:
    """Plan kills in the order of their steps, which are counted from the beginning of the run.

    Args:
        seed: seed of all random choices.
        kills: number of kills.
        ranks: number of ranks of the run.
        total_steps: number of steps of the run.
    """
    dice = random.Random(seed)
    for number, due in enumerate(sorted(dice.randint(1, total_steps) for _ in range(kills))):
        kind = KINDS[number % len(KINDS)]
        one_rank = (dice.randrange(ranks),)
        victims = dice.choice((one_rank, tuple(range(ranks))))
        events = FILE_EVENTS_OF_A_SAVE if 0 in victims else FILE_EVENTS_OF_A_PART
        yield Kill(
            signal="SIGTERM" if kind == "SIGTERM" else "SIGKILL",
            ranks=victims,
            step=due,
            file_event=dice.randrange(events) if kind == "checkpoint" else None,
            delay=dice.random(),
        )


def run_killed(trial: Trial, name: str, seed: int, kills: int) -> int:
    """Train to the end with kills; returns how many took effect."""
    total, hits = num_steps(trial.config), 0
    for planned in plan_kills(seed, kills, ranks=trial.ranks, total_steps=total):
        first = trial.step(name)
        if first >= total:
            break
        # The planned step may already be done, because an earlier kill took effect late.
        kill = replace(planned, step=max(1, planned.step - first))
        hit = trial.start(name, kill)
        hits += hit
        place = f"step {first + kill.step}" if kill.file_event is None else "a checkpoint"
        whom = "all ranks" if len(kill.ranks) == trial.ranks else f"rank {kill.ranks[0]}"
        result = f"{kill.signal} to {whom} in {place}" if hit else "the run ended before the kill"
        log.info("%s: from step %d, %s; resumes at step %d", name, first, result, trial.step(name))
    if trial.step(name) < total:
        trial.start(name, None)
    return hits


def compare(straight: dict[int, Fingerprint], killed: dict[int, Fingerprint]) -> tuple[list[str], bool]:
    """A line for each checkpoint of the uninterrupted run, and whether all are equal.

    SIGTERM leaves additional checkpoints that the uninterrupted run does not have; they are not compared.
    """
    lines = [f"{'step':>8}  {'weights':12}  {'ema':12}  {'optimizer':12}  {'metrics':12}"]
    for step, expected in sorted(straight.items()):
        shown = [hash[:12] for hash in vars(expected).values()]
        found = killed.get(step)
        differing = ["missing"] if found is None else expected.differing(found)
        verdict = f"DIFFERENT: {', '.join(differing)}" if differing else "equal"
        lines.append(f"{step:8}  " + "  ".join(shown) + f"  {verdict}")
    return lines, all(killed.get(step) == expected for step, expected in straight.items()) and bool(straight)


def verify(trial: Trial, *, seed: int, kills: int, soak_s: float) -> bool:
    """Run, kill, compare and print; repeat with further seeds for `soak_s` seconds. Returns whether all were equal."""
    ends_at = time.monotonic() + soak_s
    log.info("training %d steps without a kill; the logs are in %s", num_steps(trial.config), trial.out)
    trial.start("straight", None)
    straight = trial.fingerprints("straight")
    while True:
        name = f"killed-{seed}"
        hits = run_killed(trial, name, seed, kills)
        lines, equal = compare(straight, trial.fingerprints(name))
        print("\n".join(lines))
        verdict = "all equal" if equal else f"DIFFERENT, see {trial.out / name}"
        print(f"seed {seed}, {trial.ranks} ranks, {hits} kills: {verdict}", flush=True)
        if not equal or time.monotonic() > ends_at:
            return equal
        shutil.rmtree(trial.out / name)
        seed += 1


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.verify_resume", description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--kills", type=whole_number(0), default=10, help="how often the run is killed (default: 10)")
    parser.add_argument("--ranks", type=whole_number(1), default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="chooses the kills (default: 0)")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="repeat with more seeds for this time")
    parser.add_argument("--out", type=path_argument, help="folder for runs and logs (default: runs/verify-CONFIG)")
    options = parser.parse_args(arguments)
    start_logging(0)
    trial = _prepare(options.config, options.set, options.ranks, options.out)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a run that is under way ends as well
    return 0 if verify(trial, seed=options.seed, kills=options.kills, soak_s=60 * options.soak) else 1


def _prepare(name: str, overrides: Sequence[str], ranks: int, out: Path | None) -> Trial:
    out = (out or Path(f"runs/verify-{Path(name).stem}")).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            [f"--out is {out}, which is in use, but both runs must start from scratch: give a new folder"]
        )
    needed = [f"run.directory={out}", f"scaling.world_size={ranks}"]
    steps = num_steps(load_config(name, [*overrides, *needed]))
    interval = max(1, steps // NUM_CHECKPOINTS)
    defaults = [
        f"checkpoint.save_interval_steps={interval}",
        f"tracking.log_interval_steps={interval // 2 + 1}",  # sums are under way when a checkpoint is due
        "grids.interval_steps=null",
        "evaluation.interval_images=null",
        "checkpoint.keep_best=null",
        "tracking.backends=[]",
    ]
    needed.append(f"checkpoint.keep_last={steps + 1}")
    chosen = [*defaults, *overrides, *needed]
    config = load_config(name, chosen)
    check_device(config)
    if config.scaling.device == "gpu" and not config.run.deterministic:
        raise ConfigError(
            ["run.deterministic is false, but on a GPU both runs are equal only if it is: set run.deterministic=true"]
        )
    check_data(config)
    out.mkdir(parents=True, exist_ok=True)
    with_deepspeed = config.scaling.device == "cpu" and config.engine.backend == "deepspeed"
    load_before_forking("trainer.rank.fault_injection", *(["trainer.engine.zero_on_cpu"] if with_deepspeed else []))
    return Trial(["--config", name, *(word for words in chosen for word in ("--set", words))], config, ranks, out)


if __name__ == "__main__":
    sys.exit(main())
