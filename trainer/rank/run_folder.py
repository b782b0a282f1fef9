"""The run directory: readable only by its owner, or also by one group."""

import grp
import os
from pathlib import Path

from trainer.checkpoint.storage import shown_checkpoint
from trainer.config.draft import ConfigError
from trainer.config.sections import RunConfig
from trainer.config.train_config import TrainConfig, num_steps
from trainer.rank.progress import Outcome


def make_run_directory(config: RunConfig) -> Path:
    """Create the run directory and its missing parents; existing folders keep their permissions.

    Returns:
        Its absolute path.

    Raises:
        ConfigError: it cannot be created, or the user is not a member of the group.
    """
    directory = Path(config.directory).absolute()
    group = _group_id(config.group)
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # another rank created it and sets its permissions
                continue
            if group is not None:
                os.chown(folder, -1, group)
                folder.chmod(0o2750)  # setgid: new files in it belong to the group too
    except PermissionError as error:
        what = f"given to run.group {config.group}: you are not a member" if group is not None else "written"
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
            [f"run.group is {name}, which does not exist on this machine: give a group that `id -Gn` lists, or null"]
        ) from None


def outcome_at(config: TrainConfig, step: int) -> Outcome:
    """The outcome of a run whose newest checkpoint is at `step`."""
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
