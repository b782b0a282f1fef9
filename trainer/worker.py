"""Train without Ray: `python -m trainer.worker --config X`.

On its own it is a run with one rank; with `torchrun --nproc-per-node 2 -m trainer.worker --config X` it is one of two.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from data.storage.location import DataError
from data.stream.batches import LoaderError
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.snapshot import WeightsError
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import ConfigError, load_config
from trainer.rank.divergence import DivergenceError
from trainer.rank.progress import ProgressBar, SignalDriver
from trainer.rank.worker import run_rank

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: finished or stopped on request; 1: failed; 2: the config or the data are wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description=__doc__)
    add_config_arguments(parser)
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    start_logging(rank)
    try:
        config = load_config(options.config, [*options.set, f"scaling.world_size={os.environ.get('WORLD_SIZE', 1)}"])
        check_device(config)
        check_data(config)
        with ExitStack() as stack:
            bar = stack.enter_context(ProgressBar()) if rank == 0 else None
            outcome = run_rank(config, SignalDriver(bar))
    except (ConfigError, DataError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 2
    except (CheckpointError, DivergenceError, LoaderError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if rank == 0:
        log.info("%s at step %d: %s", "finished" if outcome.finished else "stopped", outcome.step, outcome.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
