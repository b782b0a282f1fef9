"""The runs of a sweep: every combination of the varied values, each checked before anything starts."""

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.request import job_config
from data.storage.arguments import ranges_of_whole_numbers
from trainer.config.draft import ConfigError
from trainer.config.train_config import TrainConfig

MAX_RUNS = 1000
"""Most runs of a sweep: more are a mistake in a range."""

Varied = tuple[str, tuple[str, ...]]
"""A setting by its dotted name, and its values as `--set` takes them."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: the varied values; the name of its directory.
        values: the varied values by setting.
        arguments: of trainer.run.
        config: with absolute paths.
    """

    name: str
    values: Mapping[str, str]
    arguments: tuple[str, ...]
    config: TrainConfig

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.directory)


def varied(text: str) -> Varied:
    """A type for argparse: SECTION.KEY=VALUE,VALUE,... A value such as 0-4 stands for the whole numbers 0 to 4."""
    name, equals, listed = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a setting with values: run.seed=0,1,2 or 0-2")
    if name == "run.directory":
        raise argparse.ArgumentTypeError("run.directory cannot be varied: each run gets a folder of its own in it")
    values: list[str] = []
    for value in _split(listed):
        if not value:
            raise argparse.ArgumentTypeError(f"{text!r} has an empty value: give the values of {name}, such as 0.1,0.2")
        whole = re.fullmatch(r"[0-9]+-[0-9]+", value)
        values += map(str, ranges_of_whole_numbers(value)) if whole else [value]
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise argparse.ArgumentTypeError(f"{text!r} has the value {twice} twice: give each once")
    return name, tuple(values)


def _split(text: str) -> list[str]:
    """The parts between commas that are in no brackets or braces: a value may be a list."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def make_runs(config: str, more: Sequence[str], settings: Sequence[str], vary: Sequence[Varied]) -> list[SweepRun]:
    """All combinations, the last setting varying fastest.

    Args:
        config: as `--config` of trainer.run.
        more: further arguments of trainer.run.
        settings: as `--set`, for all runs. run.directory is the folder of the runs.
        vary: what differs.

    Raises:
        ConfigError: a combination is refused; lists what is wrong with all of them.
    """
    names = [name for name, _ in vary]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError([f"--vary {name} is given twice: list all its values in one"])
        if any(text.partition("=")[0].strip() == name for text in settings):
            raise ConfigError([f"{name} is given by --vary and by --set: leave one of them out"])
    if (number := math.prod(len(values) for _, values in vary)) > MAX_RUNS:
        raise ConfigError([f"the values of --vary make {number} runs, more than {MAX_RUNS}: give fewer"])
    runs: list[SweepRun] = []
    problems: dict[str, list[str]] = {}
    folder: str | None = None
    for values in itertools.product(*(values for _, values in vary)):
        chosen = dict(zip(names, values, strict=True))
        name = _name(chosen)
        sets = [*settings, *(f"{setting}={value}" for setting, value in chosen.items())]
        given = ["--config", config, *more, *(word for text in sets for word in ("--set", text))]
        try:
            folder = folder or job_config(given).run.directory
            directory = f"run.directory={folder}/{name}"
            of_run = job_config([*given, "--set", directory])
            if of_run.checkpoint.directory is not None:
                raise ConfigError(
                    ["checkpoint.directory is set, but each run keeps its checkpoints in a folder of its own: set it "
                     "to null"]
                )  # fmt: skip
            # Absolute, since the run may start in another folder.
            places = (directory, f"data.path={of_run.data.path}")
            words = (*given, *(word for text in places for word in ("--set", text)))
            runs.append(SweepRun(name, chosen, words, of_run))
        except ConfigError as error:
            for line in error.lines:
                for setting in names:
                    line = line.replace(f"--set {setting}=", f"--vary {setting}=")
                problems.setdefault(line, []).append(name)
    if problems:
        raise ConfigError(
            line if len(of) == number else f"{line} (in {', '.join(of[:3])}{', ...' if len(of) > 3 else ''})"
            for line, of in problems.items()
        )
    _check_names(runs)
    return runs


def _name(values: Mapping[str, str]) -> str:
    """The directory of a run: short names of the settings, unless two of them would be the same."""
    last = [setting.rpartition(".")[2] for setting in values]
    names = last if len({*last}) == len(last) else [setting.replace(".", "-") for setting in values]
    parts = (f"{name}-{value}" for name, value in zip(names, values.values(), strict=True))
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:200]


def _check_names(runs: Sequence[SweepRun]) -> None:
    by_name: dict[str, SweepRun] = {}
    for run in runs:
        if other := by_name.get(run.name):
            raise ConfigError(
                [f"the runs with {dict(other.values)} and {dict(run.values)} would both be in {run.directory}: give "
                 "values that differ in letters or digits"]
            )  # fmt: skip
        by_name[run.name] = run
