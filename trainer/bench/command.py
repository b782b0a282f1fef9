"""How fast a config runs on this machine: `python -m trainer.bench steps|sampling|kernels|pace|...`.

One process, and without Ray except for `overhead`. On a machine without a GPU the CPU is measured. `steps` also runs
under torchrun, on several ranks. `bytes` counts what a GPU would move, on any machine.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.storage.arguments import whole_number
from data.storage.errors import OperationError, StoppedError, UserError, as_command
from data.storage.paths import path_argument
from trainer.bench.checkpoints import time_checkpoints
from trainer.bench.gpu import GpuBench
from trainer.bench.gpu import __doc__ as gpu_description
from trainer.bench.kernels import heaviest_kernels
from trainer.bench.made_images import make_images
from trainer.bench.measurements import time_reading, time_sampling
from trainer.bench.overhead import summarize, time_pairs
from trainer.bench.penalties import PenaltyError, compare_penalties, penalty_table
from trainer.bench.steps.measured import MeasuredPart, measured_parts
from trainer.bench.steps.stages import compare_runs, time_run
from trainer.bench.steps.timing import Report, compare_updates
from trainer.bench.traffic import TrafficReport, report_traffic, traffic_table
from trainer.bench.trial import for_this_machine
from trainer.checkpoint.format import CheckpointError
from trainer.config.command_line import (
    add_config_arguments,
    check_data,
    check_device,
    check_group,
    start_logging,
)
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig

COMMANDS = ("steps", "sampling", "kernels", "pace", "overhead", "checkpoint", "bytes", "penalties", "gpu")


def _made(options: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that put random images in the place of the data set, if that is asked for."""
    if not options.made_images:
        return []
    _, ranks = check_group()
    group = [f"scaling.world_size={ranks}"] if ranks > 1 else []
    config = load_config(options.config, [*for_this_machine(options.set), *group])
    return [f"data.path={make_images(config, folder)}"]


def _checked(config: TrainConfig) -> TrainConfig:
    check_data(config)
    check_device(config)
    return config


def _steps(options: argparse.Namespace, folder: Path) -> Report:
    overrides = [*for_this_machine(options.set), *_made(options, folder)]
    if options.flops_per_image is not None and (options.compare_authors_update or options.baseline):
        raise UserError("--flops-per-image is for mfu, which a comparison does not measure: leave it out")
    if options.compare_authors_update:
        overrides += ["engine.backend=torch", "engine.zero_stage_g=0", "engine.zero_stage_d=0"]
        if load_config(options.config, options.set).training.precision in ("bf16", "auto"):
            overrides.append("training.precision=fp32")
        last = measured_parts(options.config, overrides, folder, options.steps, 2 * (options.rounds + 1))[-1]
        return compare_updates(_checked(last.config), nchw=options.nchw)

    def parts(name: str, rounds: int) -> list[MeasuredPart]:
        found = measured_parts(name, overrides, folder, options.steps, rounds + 1)
        _checked(found[-1].config)
        return found

    if options.baseline is not None:
        ours, theirs = (parts(name, 1) for name in (options.config, options.baseline))
        _check_comparable(ours[0].config, theirs[0].config, options.baseline)
        return compare_runs(ours, theirs, options.rounds, nchw=options.nchw)
    return time_run(parts(options.config, options.rounds), options.flops_per_image, nchw=options.nchw)


def _check_comparable(ours: TrainConfig, theirs: TrainConfig, baseline: str) -> None:
    """Refuse what one process cannot measure for two configs: it has one device, and one determinism."""
    for name, a, b in (
        ("scaling.device", ours.scaling.device, theirs.scaling.device),
        ("run.deterministic", ours.run.deterministic, theirs.run.deterministic),
    ):
        if a != b:
            raise UserError(f"{name} is {a}, but {b} in the baseline {baseline}: give --set {name}=... for both")


def _last_stage(options: argparse.Namespace, folder: Path, rounds: int = 1) -> TrainConfig:
    made = _made(options, folder) if "made_images" in options else []
    return measured_parts(options.config, [*for_this_machine(options.set), *made], folder, None, rounds)[-1].config


def _kernels(options: argparse.Namespace, folder: Path) -> Report:
    return heaviest_kernels(_checked(_last_stage(options, folder, rounds=2)), options.top)


def _sampling(options: argparse.Namespace, folder: Path) -> Report:
    config = _last_stage(options, folder)
    check_device(config)
    return time_sampling(config, options.num)


def _pace(options: argparse.Namespace, folder: Path) -> Report:
    config = _last_stage(options, folder)
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


def _penalties(options: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    try:
        exact, errors = compare_penalties(options.run, batch_size=options.batch_size, num_noises=options.noises)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return {"exact": exact, "errors": [asdict(error) for error in errors]}


def _penalty_table(_options: argparse.Namespace, report: dict[str, Any]) -> str:
    return penalty_table(report["exact"], [PenaltyError(**error) for error in report["errors"]])


def _lines(_options: argparse.Namespace, report: Report) -> str:
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {value:.4g}" for name, value in report.items())


def _table(options: argparse.Namespace, report: TrafficReport) -> str:
    return traffic_table(load_config(options.config, options.set), report)


def _gpu(options: argparse.Namespace) -> int:
    """Measure everything, as `gpu.GpuBench` says. Exit code 1 if nothing could be measured."""
    options.out.mkdir(parents=True, exist_ok=True)
    bench = GpuBench(
        configs=options.configs or ["cifar10", "lsun256"],
        overrides=options.set,
        out=options.out,
        ends_at=time.monotonic() + 60 * options.minutes,
        say=lambda line: print(line, flush=True),
    )
    try:
        bench.run()
    except KeyboardInterrupt:
        raise StoppedError("stopped; the same command measures what is missing") from None
    if not any(result.report for result in bench.results.all):
        raise OperationError(f"nothing could be measured; {options.out}/logs has what each process wrote")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))

    def add(name: str, text: str, measure: Callable[[argparse.Namespace, Path], Any]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure, render=_lines)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name not in ("checkpoint", "penalties"):
            add_config_arguments(command)
        return command

    steps = add(
        "steps", "train each stage, and compare the speed with the device's own best in a large matrix product", _steps
    )
    steps.add_argument("--rounds", type=whole_number(1), default=3, help="timed rounds, after one to warm up (3)")
    steps.add_argument("--steps", type=whole_number(1), help="steps of a round (default: the interval of R1)")
    compared = steps.add_mutually_exclusive_group()
    compared.add_argument(
        "--compare-authors-update",
        action="store_true",
        help="take turns with the authors' update of D, in fp32 or tf32; of the last stage alone",
    )
    steps.add_argument(
        "--flops-per-image", type=float, metavar="N", help="FLOPs of one image, if known (default: count them)"
    )
    steps.add_argument("--nchw", action="store_true", help="in the layout NCHW, on a GPU too")
    compared.add_argument(
        "--baseline", metavar="CONFIG", help="take turns with another config, which gets the same --set, and compare"
    )
    sampling = add("sampling", "draw images with fresh weights", _sampling)
    sampling.add_argument("--num", type=whole_number(1), required=True, metavar="N", help="how many images")
    kernels = add("kernels", "the kernels that take most of the time of a step, with their share of it", _kernels)
    kernels.add_argument("--top", type=whole_number(1), default=20, metavar="N", help="how many (20)")
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
    penalties = add("penalties", "how well finite differences estimate R1 at a trained discriminator", _penalties)
    penalties.set_defaults(render=_penalty_table)
    penalties.add_argument("--run", type=path_argument, required=True, metavar="DIR", help="directory of the run")
    penalties.add_argument(
        "--batch-size", type=whole_number(1), default=32, metavar="N", help="real images, in whole groups (32)"
    )
    penalties.add_argument("--noises", type=whole_number(1), default=64, metavar="N", help="draws of the noise (64)")
    gpu = commands.add_parser(
        "gpu", help="all measurements of a GPU, in a given number of minutes", description=gpu_description
    )
    gpu.set_defaults(measure=None)
    gpu.add_argument("--minutes", type=whole_number(1), default=8, metavar="N", help="how long (8)")
    gpu.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder for the results")
    gpu.add_argument(
        "--config", dest="configs", action="append", metavar="NAME", help="may be repeated (cifar10 and lsun256)"
    )
    gpu.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    for command in (steps, kernels, pace):
        command.add_argument("--made-images", action="store_true", help="random images instead of those of data.path")
    return parser


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 1: failed; 2: the arguments, the config or the data are wrong."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        parser.error(f"the measurement is missing: name one before {given[0]}; allowed are {', '.join(COMMANDS)}")
    options = parser.parse_args(given)
    rank, _ = check_group()
    start_logging(rank)
    if options.command == "gpu":
        return _gpu(options)
    with tempfile.TemporaryDirectory(prefix="ddgan-bench-") as folder:
        report = options.measure(options, Path(folder))
    if rank == 0:
        print(json.dumps(report) if options.json else options.render(options, report))
    return 0
