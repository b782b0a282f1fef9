"""Prove that kills change nothing: `python -m trainer.verify_resume --config digits --kills 10 --ranks 2`.

Trains twice without Ray: once straight, once killed at places that a seed chooses (in a step; while something is done
to the files of a checkpoint; by SIGTERM) and started again until it is done. Then compares what the two have in every
checkpoint. Exit codes: 0, all equal; 1, something differs, or a start failed of itself; 2, the command or the config is
wrong.
"""

import argparse
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.storage.location import DataError
from trainer.checkpoint.fingerprint import Fingerprint, fingerprint
from trainer.checkpoint.format import list_checkpoints, newest_valid
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import ConfigError, load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.rank.fault_injection import MARK, Kill

log = logging.getLogger(__name__)


KINDS = ("step", "checkpoint", "SIGTERM", "checkpoint", "step")


FILE_EVENTS_OF_A_SAVE = 10
"""About so many things are done to files in a save by rank 0, and by another rank `FILE_EVENTS_OF_A_PART`."""


FILE_EVENTS_OF_A_PART = 3


NUM_CHECKPOINTS = 20


class StartFailedError(RuntimeError):
    """A start ended with an error that no kill explains."""


@dataclass(frozen=True)
class Trial:
    """What is trained, and where.

    Attributes:
        arguments: of the worker, without those of a directory.
        config: resolved.
        ranks: processes.
        out: folder of all runs and logs.
    """

    arguments: list[str]
    config: TrainConfig
    ranks: int
    out: Path

    def start(self, name: str, kill: Kill | None) -> bool:
        """Start the run `name` from where it stands, to its end or to the kill.

        Returns:
            Whether the kill hit it.

        Raises:
            StartFailedError: it failed of itself; the message ends with the log's last lines.
        """
        command = [sys.executable, "-m"]
        if self.ranks > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m"]
        command += ["trainer.rank.fault_injection", *self.arguments, "--set", f"run.directory={self.out / name}"]
        command += ["--kill", kill.to_json()] if kill else []
        file = self.out / f"{name}.log"
        with file.open("ab") as output:
            before = output.tell()
            process = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                code = process.wait()
            finally:
                process.terminate()  # torchrun takes its ranks with it
        printed = file.read_bytes()[before:].decode(errors="replace")
        killed = MARK in printed
        if code and not (killed and kill and kill.signal == "SIGKILL"):
            raise StartFailedError(f"a start of {name} ended with {code}; {file} ends:\n{printed[-2000:]}")
        return killed

    def checkpoints(self, name: str) -> Path:
        """Where the run `name` saves."""
        return self.out / name / "checkpoints"

    def step(self, name: str) -> int:
        """Where the run `name` would resume."""
        newest = newest_valid(self.checkpoints(name))
        return newest.step if newest else 0

    def fingerprints(self, name: str) -> dict[int, Fingerprint]:
        """Of every checkpoint of the run `name`, by step."""
        return {checkpoint.step: fingerprint(checkpoint) for checkpoint in list_checkpoints(self.checkpoints(name))}


def plan_kills(seed: int, kills: int, *, ranks: int, total_steps: int) -> Iterator[Kill]:
    """Kills in the order of a run, their steps counted from the beginning of the run.

    Args:
        seed: of all choices.
        kills: how many.
        ranks: of the run.
        total_steps: of the run.
    """
    dice = random.Random(seed)
    for number, due in enumerate(sorted(dice.randint(1, total_steps) for _ in range(kills))):
        kind = KINDS[number % len(KINDS)]
        alone = (dice.randrange(ranks),)
        victims = dice.choice((alone, tuple(range(ranks))))
        events = FILE_EVENTS_OF_A_SAVE if 0 in victims else FILE_EVENTS_OF_A_PART
        yield Kill(
            signal="SIGTERM" if kind == "SIGTERM" else "SIGKILL",
            ranks=victims,
            step=due,
            file_event=dice.randrange(events) if kind == "checkpoint" else None,
            delay=dice.random(),
        )


def run_killed(trial: Trial, name: str, seed: int, kills: int) -> int:
    """Train with kills to the end; returns how many of them hit."""
    total, hits = num_steps(trial.config), 0
    for planned in plan_kills(seed, kills, ranks=trial.ranks, total_steps=total):
        first = trial.step(name)
        if first >= total:
            break
        # Its step may lie behind already: a kill that was armed earlier came later.
        kill = replace(planned, step=max(1, planned.step - first))
        hit = trial.start(name, kill)
        hits += hit
        place = f"step {first + kill.step}" if kill.file_event is None else "a checkpoint"
        whom = "all ranks" if len(kill.ranks) == trial.ranks else f"rank {kill.ranks[0]}"
        said = f"{kill.signal} of {whom} in {place}" if hit else "the end came before the kill"
        log.info("%s: from step %d, %s; resumes at step %d", name, first, said, trial.step(name))
    if trial.step(name) < total:
        trial.start(name, None)
    return hits


def compare(straight: dict[int, Fingerprint], killed: dict[int, Fingerprint]) -> tuple[list[str], bool]:
    """A line for each checkpoint of the straight run, and whether all are equal.

    A stop in between leaves checkpoints that the straight run does not have; they have nothing to be compared with.
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
    """Run, kill, compare and print; goes on with further seeds for `soak_s`. Whether all was equal."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.verify_resume", description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--kills", type=int, default=10, help="how often the run is killed (default: 10)")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the kills (default: 0)")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="go on with further seeds for so long")
    parser.add_argument("--out", type=Path, help="folder of the runs and their logs (default: runs/verify-CONFIG)")
    options = parser.parse_args(arguments)
    start_logging(0)
    try:
        if options.kills < 0:
            raise ConfigError([f"--kills is {options.kills}: give 0 or more"])
        trial = _prepare(options.config, options.set, options.ranks, options.out)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the run that goes on ends as well
    try:
        equal = verify(trial, seed=options.seed, kills=options.kills, soak_s=60 * options.soak)
    except StartFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if equal else 1


def _prepare(name: str, overrides: Sequence[str], ranks: int, out: Path | None) -> Trial:
    out = (out or Path(f"runs/verify-{Path(name).stem}")).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([f"--out is {out}, which is in use: both runs must start from nothing. Give another folder"])
    if ranks < 1:
        raise ConfigError([f"--ranks is {ranks}: give 1 or more"])
    needed = [f"run.directory={out}", f"scaling.world_size={ranks}"]
    steps = num_steps(load_config(name, [*overrides, *needed]))
    interval = max(1, steps // NUM_CHECKPOINTS)
    defaults = [
        f"checkpoint.save_interval_steps={interval}",
        f"tracking.log_interval_steps={interval // 2 + 1}",  # sums are under way when a checkpoint is due
        "tracking.sample_interval_steps=null",
        "tracking.backend=none",
    ]
    needed.append(f"checkpoint.keep_last={steps + 1}")
    chosen = [*defaults, *overrides, *needed]
    config = load_config(name, chosen)
    check_device(config)
    if config.scaling.device == "gpu" and not config.run.deterministic:
        raise ConfigError(
            ["on a GPU two runs are equal only with deterministic kernels: add --set run.deterministic=true"]
        )
    check_data(config)
    out.mkdir(parents=True, exist_ok=True)
    return Trial(["--config", name, *(word for words in chosen for word in ("--set", words))], config, ranks, out)


if __name__ == "__main__":
    sys.exit(main())
