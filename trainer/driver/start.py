"""Checks and settings before Ray or a GPU is touched."""

import os
import secrets
import sys
import tempfile
from pathlib import Path

from data.storage.redaction import redact
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.lease import this_process
from trainer.checkpoint.lease_places import claim
from trainer.checkpoint.snapshot import WeightsError
from trainer.checkpoint.storage import check_not_moved, newest_seen, storage_of
from trainer.config.command_line import check_data
from trainer.config.io import ConfigError, from_dict
from trainer.config.resume import check_resumable
from trainer.config.train_config import TrainConfig
from trainer.rank.run_folder import make_run_directory


def set_up_ray() -> None:
    """Set the environment variables that Ray reads when it is imported."""
    if not os.environ.get("RAY_ADDRESS"):
        # We start our own Ray. Anybody who can reach it can run code as this user, so it needs a token even locally.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # It watches for nodes that a cloud takes back, and each worker group would wait for its start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # show every line of a rank at once
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape sequences in files
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU ranks still see the GPUs


def check_before_start(config: TrainConfig, *, resume: str) -> int:
    """Refuse everything that can be found wrong before Ray or a GPU is touched.

    Returns:
        Step of the newest checkpoint, 0 without one.

    Raises:
        ConfigError, DataError, WeightsError: the run directory, the data or the initial weights do not fit, or another
            run writes to the directory.
    """
    check_data(config)
    directory = Path(config.run.directory)
    if directory.exists() and not directory.is_dir():
        raise ConfigError([f"run.directory is {directory}, which is a file; give a folder"])
    if resume == "never" and directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            [
                f"--resume is never, but {directory} already holds a run: give another run.directory, or omit --resume "
                "never to resume that run"
            ]
        )
    try:
        storage = storage_of(config)
        newest = newest_seen(storage)
        if newest is None:
            check_not_moved(config)
    except CheckpointError as error:
        raise ConfigError([str(error)]) from error
    if newest:
        check_resumable(from_dict(newest.manifest["config"], str(newest.path)), config)
    elif config.run.init_from and not Path(config.run.init_from).is_file():
        raise WeightsError(redact(f"run.init_from is {config.run.init_from}: there is no such file"))
    try:
        make_run_directory(config.run)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError([f"run.directory is {directory}, which cannot be written: {error.strerror}"]) from error
    try:
        storage.check_writable()
    except OSError as error:
        raise ConfigError([f"checkpoint.directory is {storage.shown}, which cannot be written: {error}"]) from error
    # Released at once: rank 0 claims it when it starts, on whatever host it runs.
    claim(config, this_process()).release()
    return newest.step if newest else 0
