"""How fast a config trains on this machine: `python -m trainer.bench --config cifar10`. One process, without Ray.

On a machine without a GPU the CPU is measured; `--made-images` needs no data set. `mfu` is the part of the device's own
best, that of a large matrix product, which the steps reach.

With `--pace N` no network runs: batches are taken as for a device that trains N images a second, and what is measured
is how long it would stand still for want of them. With `--sampling N` nothing is trained, images are drawn.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.storage.location import DataError
from data.stream.batches import LoaderError
from trainer.bench.made_images import make_images
from trainer.bench.measurements import compare_updates, measure_pace, measure_sampling, measure_steps
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import ConfigError, load_config
from trainer.config.train_config import TrainConfig
from trainer.rank.loop import Share


def _bench_config(options: argparse.Namespace, run_directory: str) -> TrainConfig:
    """The config of one rank that keeps nothing: its share of the global batch stays what it is on all ranks."""
    # What is there is measured, unless the user says which device it should be.
    overrides = [*([] if torch.cuda.is_available() else ["scaling.device=cpu"]), *options.set]
    config = load_config(options.config, overrides)
    share = Share.of(config, 0, config.scaling.world_size)
    batch = share.stop - share.start
    # Whole intervals of R1, so that it counts with its real frequency.
    steps = options.steps or config.training.r1_interval_steps or 1
    rounds = (options.rounds + 1) * (2 if options.compare_authors_update else 1)
    plain = ["engine.backend=torch", "engine.zero_stage_g=0", "engine.zero_stage_d=0", "training.precision=fp32"]
    chosen = load_config(
        options.config,
        [
            *overrides,
            *(plain if options.compare_authors_update else []),
            "scaling.world_size=1",
            f"training.micro_batch_size={share.micro_batch_size}",
            f"training.global_batch_size={batch}",
            f"training.total_images={batch * steps * rounds}",
            f"tracking.log_interval_steps={steps}",
            "tracking.backend=none",
            "run.init_from=null",
            f"run.directory={run_directory}",
        ],
    )
    if options.made_images:
        made = make_images(chosen, Path(run_directory))
        return replace(chosen, data=replace(chosen.data, path=str(made)))
    return chosen


def positive(text: str) -> int:
    """A whole number of 1 or more, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a whole number of 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1: failed; 2: the arguments, the config or the data are wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=(__doc__ or "").partition("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="rounds that are timed, after one to warm up (3)")
    parser.add_argument("--steps", type=positive, help="steps of a round (default: the interval of R1)")
    parser.add_argument(
        "--pace", type=positive, metavar="N", help="only take images, at N a second, and time the waiting"
    )
    parser.add_argument("--seconds", type=positive, default=10, help="length of a run with --pace (10)")
    parser.add_argument(
        "--compare-authors-update", action="store_true", help="take turns with the authors' update of D, in fp32"
    )
    parser.add_argument(
        "--sampling", type=positive, metavar="N", help="draw N images with fresh weights, and do not train"
    )
    parser.add_argument("--made-images", action="store_true", help="random images instead of those of data.path")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    start_logging(0)
    try:
        with tempfile.TemporaryDirectory(prefix="ddgan-bench-") as folder:
            config = _bench_config(options, folder)
            if options.sampling:
                check_device(config)
                report = measure_sampling(config, options.sampling)
            elif options.pace:
                check_data(config)
                report = measure_pace(config, images_per_s=options.pace, seconds=options.seconds)
            else:
                check_data(config)
                check_device(config)
                report = compare_updates(config) if options.compare_authors_update else measure_steps(config)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    except (LoaderError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        json.dumps(report) if options.json else "\n".join(f"{name:<18} {value:.4g}" for name, value in report.items())
    )
    return 0
