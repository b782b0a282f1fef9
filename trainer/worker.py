"""Train without Ray: `python -m trainer.worker --config X`.

On its own it is a run with one rank; with `torchrun --nproc-per-node 2 -m trainer.worker --config X` it is one of two.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data.storage.errors import as_command
from trainer.checkpoint.resume import Resume, ResumeError, add_resume_argument, choose
from trainer.config.command_line import add_config_arguments, check_data, check_device, check_group, start_logging
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.evaluate.during_training import check_evaluation
from trainer.rank.progress import ProgressBar, SignalDriver
from trainer.rank.worker import run_rank
from trainer.timing.time_sheet import process_began
from trainer.tracking.store import check_trackers

log = logging.getLogger(__name__)


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: finished or stopped on request; 1: failed; 2: the config or the data are wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description=__doc__)
    add_config_arguments(parser)
    add_resume_argument(parser)
    options = parser.parse_args(arguments)
    rank, world_size = check_group()
    start_logging(rank)
    config = load_config(options.config, [*options.set, f"scaling.world_size={world_size}"])
    check_device(config)
    check_data(config)
    check_evaluation(config)
    check_trackers(config.tracking, Path(config.run.directory))
    if rank == 0 and options.resume != Resume():  # the other ranks wait for this one when they form their group
        _, move_others_aside = choose(config, options.resume)
        move_others_aside()
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar()) if rank == 0 else None
        try:
            outcome = run_rank(config, SignalDriver(bar), process_began())
        except ResumeError as error:
            raise ConfigError([str(error)]) from error
    if rank == 0:
        log.info("%s at step %d: %s", "finished" if outcome.finished else "stopped", outcome.step, outcome.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
