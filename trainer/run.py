"""Train: `python -m trainer.run --config digits`. To resume a run, give the same command again.

Exit codes: 0, finished; 75, stopped on request after a checkpoint, the same command goes on; 1, failed; 2, the command,
the config, the data or the cluster is wrong; 130, stopped at once.
"""

import argparse
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.location import is_remote
from data.shards import DataError
from trainer.checkpoint import CheckpointError
from trainer.checkpoint_storage import check_not_moved, newest_seen, storage_of
from trainer.command import add_config_arguments, check_data, start_logging
from trainer.config import TrainConfig, num_steps
from trainer.config_io import ConfigError, dump_config, from_dict, load_config
from trainer.lease import this_process
from trainer.lease_places import claim
from trainer.plan import make_plan, render
from trainer.resume_rules import check_resumable
from trainer.run_directory import make_run_directory
from trainer.snapshot import WeightsError
from trainer.tracking import redact, tracking_uri
from trainer.worker import Outcome, outcome_at

log = logging.getLogger(__name__)

PATHS = (
    "run.directory",
    "run.init_from",
    "data.path",
    "data.cache_directory",
    "checkpoint.directory",
    "evaluation.network",
    "evaluation.reference",
)
"""Settings that name a file or folder; some of them may be a URL instead."""
STOPPED = os.EX_TEMPFAIL
"""Exit code of a run that ended before its end because it was asked to; to a scheduler: start it again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, launch on Ray, close."""
    options = parse_arguments(arguments)
    start_logging(0)
    try:
        config = config_of(options)
        if options.dry_run:
            print(redact(dump_config(config)) + "\n" + render(make_plan(config)))
            return 0
        config = with_absolute_paths(config, inside_job=inside_ray_job())
        done = check_before_start(config, resume=options.resume)
    except (ConfigError, DataError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while hashes are checked, or another run's lease is watched
        return 130
    if done >= num_steps(config):
        print(_summary(config, outcome_at(config, done)))
        return 0
    return _launch(config)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options; argparse ends the process if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Train a Denoising Diffusion GAN on Ray Train and DeepSpeed. The same command again resumes.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on from the newest valid checkpoint, if there is one; never: refuse a used run directory",
    )
    parser.add_argument("--init-from", metavar="FILE", help="start from a snapshot's or published generator weights")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, and stop")
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The config that the options give.

    Raises:
        ConfigError: it is wrong.
    """
    overrides = [*options.set, *([f"run.init_from={options.init_from}"] if options.init_from else [])]
    return load_config(options.config, overrides)


def inside_ray_job() -> bool:
    """Whether this process drives a `ray job submit`, where each process has a temporary folder of its own."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def set_up_ray() -> None:
    """What Ray must find in the environment when it is imported."""
    if not os.environ.get("RAY_ADDRESS"):
        # A Ray of our own. Whoever can talk to it can run code as this user, so even here it asks for a token.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # ranks on the CPU still see what GPUs there are


def with_absolute_paths(config: TrainConfig, *, inside_job: bool) -> TrainConfig:
    """The config with its paths made absolute, as each worker sees them from its own current directory.

    Raises:
        ConfigError: inside a Ray job a relative path would be lost with the job's temporary folder.
    """
    given: dict[tuple[str, str], str | None] = {
        (section, field): getattr(getattr(config, section), field) for section, field in (n.split(".") for n in PATHS)
    }
    local = {
        name: path for name, path in given.items() if path and not is_remote(path) and not path.startswith("file:")
    }
    relative = {f"{section}.{field}": path for (section, field), path in local.items() if not Path(path).is_absolute()}
    if inside_job and relative:
        raise ConfigError(
            f"{name} is {path}, a relative path: inside a Ray job each process has a temporary folder of its own, and "
            f"what is written there is lost. Give an absolute path that all nodes share: --set {name}=/shared/..."
            for name, path in relative.items()
        )
    for (section, field), path in local.items():
        changed = replace(getattr(config, section), **{field: str(Path(path).absolute())})
        config = replace(config, **{section: changed})
    return config


def check_before_start(config: TrainConfig, *, resume: str) -> int:
    """Refuse whatever can be seen to be wrong before Ray or a GPU is touched.

    Returns:
        Steps done by the newest checkpoint, 0 without one.

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
                f"--resume never, but {directory} already holds a run: give another run.directory, or leave --resume "
                "never out to go on with it"
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
        raise WeightsError(f"run.init_from is {config.run.init_from}: there is no such file")
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
    # Not held: the ranks take it when they start, wherever rank 0 then is.
    claim(config, this_process()).release()
    return newest.step if newest else 0


def _launch(config: TrainConfig) -> int:
    set_up_ray()
    from trainer.ray_adapter import ClusterError, RunFailedError, fit  # takes seconds: not for a dry run or a refusal

    try:
        outcome = fit(config)
    except (ClusterError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(f"{error}\nTo go on from the last checkpoint, give the same command again.", file=sys.stderr)
        return 1
    except SystemExit:  # Ray's answer to a SIGTERM, as long as no rank is there to be asked
        print("stopped before the ranks started; the same command goes on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(_summary(config, outcome))
    return 0 if outcome.finished else STOPPED


def _summary(config: TrainConfig, outcome: Outcome) -> str:
    directory = Path(config.run.directory)
    head = "finished" if outcome.finished else "stopped; the same command resumes"
    lines = [
        f"{head}: step {outcome.step}, {outcome.images} images",
        f"samples      {outcome.samples or 'none yet'}",
        f"checkpoint   {outcome.checkpoint}",
        f"snapshot     {outcome.snapshot or 'written at the end of the run'}",
    ]
    if config.tracking.backend == "mlflow":
        lines.append(f"MLflow       {redact(tracking_uri(config.tracking, directory))}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
