"""Shared by the commands that take a config: arguments, logging, and the check of the data before a start."""

import argparse
import logging
import os
import sys
from typing import Any

import torch

from data.shards.files import check_room
from data.shards.index import ShardIndex, load_index
from data.shards.verification import verify_shards
from data.storage.arguments import whole_number
from data.storage.redaction import redact
from data.stream.pipeline import check_form
from trainer.config.draft import ConfigError
from trainer.config.explain import explain, schema
from trainer.config.train_config import TrainConfig


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a config."""
    parser.add_argument("--config", required=True, help="name in trainer/configs (digits, cifar10, ...) or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated"
    )


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments that print the meaning of settings and exit, like --help; they need no config."""
    parser.add_argument(
        "--explain",
        action=_Print,
        nargs="?",
        metavar="SECTION[.KEY]",
        help="explain one setting, the settings of a section, or all settings, then exit",
    )
    parser.add_argument("--schema", action=_Print, nargs=0, help="print the JSON schema of configs, then exit")


class _Print(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            text = schema() if option == "--schema" else explain(values)
        except ConfigError as error:
            parser.exit(2, f"{error}\n")
        sys.stdout.write(f"{text}\n")
        parser.exit()


def add_seed_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --seed, the seed of all random numbers of samples; 0 by default."""
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help=f"{help} (default: 0)")


def add_price_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --usd-per-gpu-hour."""
    parser.add_argument("--usd-per-gpu-hour", type=_price, metavar="X", help=help)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a price: give US dollars, such as 2.50")
    return price


class _ShownFormatter(logging.Formatter):
    """Log lines without secrets: libraries put whole URLs into their errors."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the traceback if there is one."""
        return redact(super().format(record))


class _CurrentStderr:
    """sys.stderr at the time a line is written: while a progress bar is shown, it writes above the bar."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def start_logging(rank: int) -> None:
    """Log lines with time and rank to stderr; ranks other than 0 log only warnings and errors."""
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter(_ShownFormatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)


def check_group() -> tuple[int, int]:
    """The rank of this process and the number of ranks, as torchrun gives them; without torchrun 0 and 1.

    Raises:
        ConfigError: some of torchrun's variables are missing: others have left the rest in the environment.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    left = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not left:
        return 0, 1
    try:
        rank, world_size = (int(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        rank, world_size = 0, 0
    if missing or not 0 <= rank < world_size:
        what = f"{', '.join(missing)} is not set" if missing else "that is no rank of a group"
        raise ConfigError(
            [
                f"the environment has {' and '.join(left)}, but {what}. Start the ranks with torchrun, which sets "
                f"{', '.join(names)}; for a single rank: unset RANK WORLD_SIZE LOCAL_RANK"
            ]
        )
    return rank, world_size


def check_device(config: TrainConfig) -> None:
    """Refuse a config for GPUs on a machine without a GPU.

    Raises:
        ConfigError: says what to do.
    """
    if config.scaling.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError(["scaling.device is gpu, but torch finds none on this machine: set scaling.device=cpu"])


def check_data(config: TrainConfig) -> ShardIndex:
    """Load the index of the run's data; check that it fits the config and that every shard exists, unaltered.

    Raises:
        DataError: data are missing or do not fit; says which, and what to do.
    """
    index = load_index(config.data.path)
    check_form(config.data, index)
    check_room(index, cache_gb=config.data.cache_gb, window_shards=config.data.shuffle_window_shards)
    verify_shards(index, by=config.data.verify, cache_directory=config.data.cache_directory)
    return index
