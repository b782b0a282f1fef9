"""The folder of a run: made readable by its owner alone, or by one group beside."""

import grp
import os
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.storage import shown_checkpoint
from trainer.config.io import ConfigError
from trainer.config.sections import RunConfig
from trainer.config.train_config import TrainConfig, num_steps


def make_run_directory(config: RunConfig) -> Path:
    """Make it, and its parents, where it is not there yet; what is there keeps its permissions.

    Returns:
        The folder.

    Raises:
        ConfigError: it cannot be made, or the group is none of this user's.
    """
    directory = Path(config.directory).absolute()
    group = _group_id(config.group)
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # another rank was faster, and gives it its permissions
                continue
            if group is not None:
                os.chown(folder, -1, group)
                folder.chmod(0o2750)  # what is made in it belongs to the group too
    except PermissionError as error:
        what = f"given to run.group {config.group}, of which you are no member" if group is not None else "written"
        raise ConfigError([f"run.directory is {directory}, which cannot be {what}: {error.strerror}"]) from error
    except OSError as error:
        raise ConfigError([f"run.directory is {directory}, which cannot be written: {error.strerror}"]) from error
    return directory


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            [f"run.group is {name}: there is no such group on this machine; `id -Gn` lists yours, null: no group"]
        ) from None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: the planned number of images was reached; otherwise it was stopped and resumes by the same command.
        step, images: done in all.
        checkpoint: the last one.
        samples: the last grid, or None.
        snapshot: averaged weights of a finished run, or None.
    """

    finished: bool
    step: int
    images: int
    checkpoint: str
    samples: str | None
    snapshot: str | None


def outcome_at(config: TrainConfig, step: int) -> Outcome:
    """How a run whose newest checkpoint is of `step` stands."""
    directory = Path(config.run.directory)
    grids = sorted((directory / "samples").glob("step-*.png"))
    snapshot = directory / "snapshots" / f"step-{step:08d}"
    return Outcome(
        finished=step >= num_steps(config),
        step=step,
        images=step * config.training.global_batch_size,
        checkpoint=shown_checkpoint(config, step),
        samples=str(grids[-1]) if grids else None,
        snapshot=str(snapshot) if snapshot.exists() else None,
    )
