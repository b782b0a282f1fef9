"""Checks before Ray or a GPU is touched."""

import tempfile
from pathlib import Path

from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.lease import this_process
from trainer.checkpoint.lease_places import claim
from trainer.checkpoint.resume import Resume, choose
from trainer.checkpoint.snapshot import WeightsError, is_snapshot
from trainer.checkpoint.storage import newest_seen, storage_of, storage_of_run
from trainer.config.command_line import check_data
from trainer.config.draft import ConfigError
from trainer.config.stages import stages_of
from trainer.config.train_config import TrainConfig
from trainer.evaluate.during_training import check_evaluation
from trainer.rank.build import check_discriminator_start
from trainer.rank.run_folder import make_run_directory
from trainer.tracking.store import check_trackers


def check_start(source: Path) -> None:
    """Refuse a `run.init_from` that has no weights.

    Raises:
        WeightsError: there is none, or it is the folder of something else.
        CheckpointError: it is the folder of a run without a valid checkpoint.
    """
    if source.is_file() or is_snapshot(source):
        return
    if not source.is_dir():
        raise WeightsError(f"run.init_from is {source}: there is no such file or folder")
    if not (source / "config.yaml").is_file():
        raise WeightsError(f"run.init_from is {source}, which is the folder of no run, snapshot or exported model")
    storage = storage_of_run(source)
    if newest_seen(storage) is None:
        raise CheckpointError(f"run.init_from is {source}, which holds no valid checkpoint yet")


def check_before_start(config: TrainConfig, resume: Resume) -> int:
    """Refuse everything that can be found wrong before Ray or a GPU is touched; then do what --resume asks for.

    Returns:
        Step of the newest checkpoint, 0 without one.

    Raises:
        ConfigError, DataError, WeightsError, TrackingError: the run directory, the data, the initial weights, a
            tracker or its URI do not fit, or another run writes to the directory.
    """
    check_data(config)
    check_evaluation(config)
    directory = Path(config.run.directory)
    check_trackers(config.tracking, directory)
    if directory.exists() and not directory.is_dir():
        raise ConfigError([f"run.directory is {directory}, which is a file; give a folder"])
    newest, move_others_aside = choose(config, resume)
    if config.run.init_from:
        source = Path(config.run.init_from)
        if source.resolve() == directory.resolve():
            raise WeightsError(
                f"run.init_from is {source}, the directory of this very run: set another run.directory, or leave "
                "run.init_from out to resume it"
            )
        if newest is None:
            check_start(source)
    if newest is None:
        check_discriminator_start(stages_of(config)[0].config)
    try:
        make_run_directory(config.run)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError([f"run.directory is {directory}, which cannot be written: {error.strerror}"]) from error
    storage = storage_of(config)
    try:
        storage.check_writable()
    except OSError as error:
        raise ConfigError([f"checkpoint.directory is {storage.shown}, which cannot be written: {error}"]) from error
    # Released at once: rank 0 claims it when it starts, on whatever host it runs.
    claim(config, this_process()).release()
    move_others_aside()
    return newest.step if newest else 0
