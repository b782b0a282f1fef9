"""Where a run resumes. A run that has saved checkpoints never starts again from step 0 unless the user says so."""

import argparse
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.storage.files import read_note, set_aside, timestamp, write_json
from trainer.checkpoint.format import Checkpoint, CheckpointError, folder_names, step_of
from trainer.checkpoint.lease import launch_id
from trainer.checkpoint.lease_places import claim
from trainer.checkpoint.snapshot import averages_folder
from trainer.checkpoint.storage import find_checkpoint, newest_seen, storage_of, survey
from trainer.config.draft import ConfigError
from trainer.config.io import from_dict, load_stored
from trainer.config.resume import check_resumable
from trainer.config.train_config import TrainConfig

log = logging.getLogger(__name__)

HISTORY = "last-checkpoint.json"
"""File of the run directory that says that the run has saved checkpoints, wherever they are."""
_WAYS = (
    "Nothing was changed. To continue, do one of three things: put this right and repeat the command; resume from an "
    "older checkpoint with --resume from:STEP; or start again from step 0 with --resume restart. The last two keep the "
    "other checkpoints, in a folder of their own next to the new ones"
)


class ResumeError(CheckpointError):
    """A run has checkpoints, or had some, but cannot resume; says what is wrong with each and how to continue."""


@dataclass(frozen=True)
class Resume:
    """The value of --resume.

    Attributes:
        how: "auto": from the newest valid checkpoint, from step 0 if the run has none; "never": refuse a used
            directory; "restart": from step 0; "from": from the checkpoint of `step`.
        step: optimizer steps done.
    """

    how: Literal["auto", "never", "restart", "from"] = "auto"
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Resume":
        """From the command line."""
        if text in ("auto", "never", "restart"):
            return cls(text)
        kind, _, step = text.partition(":")
        if kind != "from" or not (step.isascii() and step.isdigit()) or len(step) > 18:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; allowed are auto, never, restart and from:STEP, such as from:500"
            )
        return cls("from", int(step))


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    """Add --resume."""
    parser.add_argument(
        "--resume",
        type=Resume.parse,
        default=Resume(),
        metavar="{auto,never,restart,from:STEP}",
        help="auto: resume from the newest valid checkpoint, if there is one; never: refuse a used run directory; "
        "restart: start from step 0; from:STEP: resume from that checkpoint. The last two move later checkpoints aside",
    )


def newest_to_resume(config: TrainConfig, *, fetch: bool) -> Checkpoint | None:
    """The checkpoint from which the run resumes; None only if it has never saved one.

    Args:
        config: of the run.
        fetch: download and verify it; otherwise only file sizes are compared in remote storage.

    Raises:
        ResumeError: the newest cannot be read at present, none is valid, or all that were saved are gone.
        UnreadableError: the storage cannot be read.
    """
    storage, run = storage_of(config), Path(config.run.directory)
    found = survey(storage, fetch=fetch)
    problems = [f"{name}: {problem}" for name, problem in found.problems.items()]
    if found.unreadable:
        rest = f". The newest that can be read is of step {found.newest.step}" if found.newest else ""
        raise ResumeError(f"{storage.shown} has checkpoints that cannot be read. {'. '.join(problems)}{rest}. {_WAYS}")
    if found.newest is None and problems:
        raise ResumeError(f"{storage.shown} has checkpoints, but none is valid. {'. '.join(problems)}. {_WAYS}")
    if found.newest is None:
        _check_not_moved(config)
        if last := _last_saved(run / HISTORY):
            raise ResumeError(
                f"{storage.shown} has no checkpoint, but the run in {run} has saved some, the last one of {last}: they "
                f"were moved or deleted, or the volume is not mounted. {_WAYS}"
            )
    return found.newest


def note_saved(config: TrainConfig, step: int) -> None:
    """Note in the run directory that a checkpoint was saved."""
    try:
        write_json(Path(config.run.directory) / HISTORY, {"step": step, "saved_in": storage_of(config).shown})
    except OSError as error:
        log.warning("cannot note the last checkpoint in %s: %s", config.run.directory, error)


def _last_saved(file: Path) -> str:
    """What the note says of the last checkpoint; empty if there is no note. A damaged one shows that there was one."""
    try:
        noted = json.loads(file.read_bytes())
        return f"step {noted['step']} in {noted['saved_in']}"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "an unknown step"


def _check_not_moved(config: TrainConfig) -> None:
    """Check that a run that finds no checkpoint has none at the place that its last start used.

    Raises:
        ResumeError: it has some there; starting from scratch is hardly what the user wants.
        UnreadableError: the place of the last start cannot be read.
    """
    file = Path(config.run.directory) / "config.yaml"
    stored = read_note(file, lambda _: load_stored(file))
    if stored is None:
        return
    before, now = storage_of(stored), storage_of(config)
    found = newest_seen(before) if before.location != now.location else None
    if found:
        raise ResumeError(
            f"checkpoint.directory is {now.shown}, which holds no checkpoint, but the run in {file.parent} has kept "
            f"its own in {before.shown}, the newest of step {found.step}. Copy them, set checkpoint.directory back, or "
            "start again in another run.directory"
        )


def choose(config: TrainConfig, resume: Resume) -> tuple[Checkpoint | None, Callable[[], None]]:
    """Choose the checkpoint from which the run resumes, before anything is started or changed.

    Returns:
        The checkpoint, or None for a start from step 0; and what moves the others aside, for when all else is checked.

    Raises:
        ConfigError: the run cannot resume in this way, or its directory is used and may not be.
    """
    directory = Path(config.run.directory)
    if resume.how in ("restart", "from") and _is_restart():
        resume = Resume()
    if resume.how == "never" and directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            [
                f"--resume is never, but {directory} already holds a run: give another run.directory, or omit --resume "
                "never to resume that run"
            ]
        )
    try:
        match resume.how:
            case "restart":
                newest = None
            case "from":
                newest = find_checkpoint(storage_of(config), resume.step)
            case _:
                newest = newest_to_resume(config, fetch=False)
    except CheckpointError as error:
        raise ConfigError([str(error)]) from error
    if newest:
        check_resumable(from_dict(newest.manifest["config"], str(newest.path)), config)
    if resume.how not in ("restart", "from"):
        return newest, lambda: None
    return newest, lambda: _move_aside(config, after=newest.step if newest else -1)


def _is_restart() -> bool:
    """Whether a scheduler has started this command again: what the user asked for was done at the first start."""
    return any(os.environ.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _move_aside(config: TrainConfig, *, after: int) -> None:
    """Move all checkpoints after a step aside, readable or not, and the averages that the run wrote after it.

    Raises:
        LeaseError: another run writes to the directory.
        CheckpointError: they cannot be moved.
    """
    storage, folder = storage_of(config), f"aside-{timestamp().replace(':', '')}"
    held = claim(config, launch_id())
    try:
        moved = [name for name in storage.names() if step_of(name) > after]
        for name in moved:
            storage.set_aside(name, folder)
        averages = averages_folder(Path(config.run.directory))
        for name in (name for name in folder_names(averages) if step_of(name) > after):
            (averages / folder).mkdir(exist_ok=True)
            (averages / name).rename(averages / folder / name)
        if moved:
            log.warning("moved %s aside, to %s/%s", ", ".join(moved), storage.shown, folder)
        if after < 0:
            set_aside(Path(config.run.directory) / HISTORY)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be moved aside: {error}") from error
    finally:
        held.release()
