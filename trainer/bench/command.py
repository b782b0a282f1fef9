"""How fast a config runs on this machine: `python -m trainer.bench steps|sampling|pace|overhead|checkpoint|bytes`.

One process, and without Ray except for `overhead`. On a machine without a GPU the CPU is measured. `bytes` counts what
a GPU would move, on any machine.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from trainer.bench.checkpoints import time_checkpoints
from trainer.bench.made_images import make_images
from trainer.bench.measurements import Report, compare_updates, time_reading, time_sampling, time_steps
from trainer.bench.overhead import summarize, time_pairs
from trainer.bench.traffic import TrafficReport, report_traffic, traffic_table
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.rank.loop import Share

COMMANDS = ("steps", "sampling", "pace", "overhead", "checkpoint", "bytes")


def _config_of_one_rank(
    options: argparse.Namespace, folder: Path, *, steps: int | None = None, rounds: int = 1, more: Sequence[str] = ()
) -> TrainConfig:
    """A config for one rank that saves nothing; the rank's share of the global batch is the same as with all ranks.

    Args:
        options: command options.
        folder: for the run, and for generated images.
        steps: steps between two points of the curves; None: whole intervals of R1, for its real frequency.
        rounds: points of the curves.
        more: overrides.
    """
    # Measure the machine's own device unless the user chose one.
    overrides = [*([] if torch.cuda.is_available() else ["scaling.device=cpu"]), *options.set]
    config = load_config(options.config, overrides)
    share = Share.of(config, 0, config.scaling.world_size)
    batch, steps = share.stop - share.start, steps or config.training.r1_interval_steps or 1
    chosen = load_config(
        options.config,
        [
            *overrides,
            *more,
            "scaling.world_size=1",
            f"training.micro_batch_size={share.micro_batch_size}",
            f"training.global_batch_size={batch}",
            f"training.total_images={batch * steps * rounds}",
            f"tracking.log_interval_steps={steps}",
            "tracking.backend=none",
            "run.init_from=null",
            f"run.directory={folder}",
        ],
    )
    if "made_images" in options and options.made_images:
        return replace(chosen, data=replace(chosen.data, path=str(make_images(chosen, folder))))
    return chosen


def _steps(options: argparse.Namespace, folder: Path) -> Report:
    if options.compare_authors_update:
        plain = ["engine.backend=torch", "engine.zero_stage_g=0", "engine.zero_stage_d=0", "training.precision=fp32"]
        rounds, measure = 2 * (options.rounds + 1), compare_updates
    else:
        plain, rounds, measure = [], options.rounds + 1, time_steps
    config = _config_of_one_rank(options, folder, steps=options.steps, rounds=rounds, more=plain)
    check_data(config)
    check_device(config)
    return measure(config)


def _sampling(options: argparse.Namespace, folder: Path) -> Report:
    config = _config_of_one_rank(options, folder)
    check_device(config)
    return time_sampling(config, options.num)


def _pace(options: argparse.Namespace, folder: Path) -> Report:
    config = _config_of_one_rank(options, folder)
    check_data(config)
    return time_reading(config, images_per_s=options.images_per_s, seconds=options.seconds)


def _overhead(options: argparse.Namespace, folder: Path) -> Report:
    return summarize(time_pairs(options.config, options.set, options.steps, options.rounds, folder))


def _checkpoint(options: argparse.Namespace, _folder: Path) -> Report:
    if not options.out.is_dir():
        raise UserError(f"--out is {options.out}, which is not a folder: name one on the disk to measure")
    return time_checkpoints(options.out, options.mb * 10**6, options.rounds)


def _bytes(options: argparse.Namespace, _folder: Path) -> TrafficReport:
    return report_traffic(load_config(options.config, options.set))


def _lines(_options: argparse.Namespace, report: Report) -> str:
    return "\n".join(f"{name:<18} {value:.4g}" for name, value in report.items())


def _table(options: argparse.Namespace, report: TrafficReport) -> str:
    return traffic_table(load_config(options.config, options.set), report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))

    def add(name: str, text: str, measure: Callable[[argparse.Namespace, Path], Any]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure, render=_lines)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name != "checkpoint":
            add_config_arguments(command)
        return command

    steps = add("steps", "train, and compare the speed with the device's own best in a large matrix product", _steps)
    steps.add_argument("--rounds", type=whole_number(1), default=3, help="timed rounds, after one to warm up (3)")
    steps.add_argument("--steps", type=whole_number(1), help="steps of a round (default: the interval of R1)")
    steps.add_argument(
        "--compare-authors-update", action="store_true", help="take turns with the authors' update of D, in fp32"
    )
    sampling = add("sampling", "draw images with fresh weights", _sampling)
    sampling.add_argument("--num", type=whole_number(1), required=True, metavar="N", help="how many images")
    pace = add("pace", "take images as a device of a given speed does, and time its waiting", _pace)
    pace.add_argument("--images-per-s", type=whole_number(1), required=True, metavar="N", help="speed of that device")
    pace.add_argument("--seconds", type=whole_number(1), default=10, help="how long (10)")
    overhead = add("overhead", "what Ray, tracking and checkpoints cost in addition to the steps", _overhead)
    overhead.add_argument("--steps", type=whole_number(1), default=200, help="steps that are timed in a round (200)")
    overhead.add_argument("--rounds", type=whole_number(1), default=3, help="pairs of runs (3)")
    checkpoint = add("checkpoint", "how long a checkpoint holds training", _checkpoint)
    checkpoint.add_argument("--mb", type=whole_number(4), default=1000, help="size of the state in 10^6 bytes (1000)")
    checkpoint.add_argument("--rounds", type=whole_number(1), default=3, help="saves (3)")
    checkpoint.add_argument(
        "--out", type=path_argument, default=Path(tempfile.gettempdir()), help="folder on that disk"
    )
    add("bytes", "count the bytes that a step moves on a GPU, by kind of operation", _bytes).set_defaults(render=_table)
    for command in (steps, pace):
        command.add_argument("--made-images", action="store_true", help="random images instead of those of data.path")
    return parser


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 1: failed; 2: the arguments, the config or the data are wrong."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        parser.error(f"what to measure comes first, before {given[0]}: {', '.join(COMMANDS)}")
    options = parser.parse_args(given)
    start_logging(0)
    with tempfile.TemporaryDirectory(prefix="ddgan-bench-") as folder:
        report = options.measure(options, Path(folder))
    print(json.dumps(report) if options.json else options.render(options, report))
    return 0
