"""How fast a config trains on this machine: `python -m trainer.bench --config cifar10`. One process, without Ray.

On a machine without a GPU the CPU is measured; `--made-images` needs no data set. `mfu` is the part of the device's own
best, that of a large matrix product, which the steps reach.

With `--pace N` no network runs: batches are taken as for a device that trains N images a second, and what is measured
is how long it would stand still for want of them. With `--sampling N` nothing is trained, images are drawn.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.batches import LoaderError
from data.pipeline import open_batches
from data.shards import DataError, load_index
from models.diffusion import Diffusion
from trainer.authors_update import update_discriminator_through_generator as update_through_generator
from trainer.command import add_config_arguments, check_data, check_device, start_logging
from trainer.config import TrainConfig
from trainer.config_io import ConfigError, load_config
from trainer.cost import measure_costs
from trainer.device_peak import matmul_flops_per_s
from trainer.loop import Loop, Share
from trainer.made_images import make_images
from trainer.progress import Status
from trainer.ranks import Ranks
from trainer.sample import sample_batches
from trainer.snapshot import build_generator
from trainer.step import Statistics, update_discriminator
from trainer.worker import Worker, prepare_torch

Report = dict[str, float]


class _Driver:
    """Neither reports nor stops."""

    def report(self, status: Status) -> None:
        """Nobody looks."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


def time_rounds(
    config: TrainConfig, updates_d: Sequence[Callable[..., Statistics]] = (update_discriminator,)
) -> list[Report]:
    """Time whole steps: data, both updates, R1 at its own frequency, optimizer and average; no checkpoint, no grid.

    Args:
        config: of one rank. Each of its log intervals is a round.
        updates_d: updates of the discriminator that take turns, one a round.

    Returns:
        What the loop logs, round by round.
    """
    rounds: list[Report] = []

    def finish_round(metrics: Report) -> None:
        rounds.append(metrics)
        loop.update_d = updates_d[len(rounds) % len(updates_d)]

    prepare_torch(config)
    ranks = Ranks.join(config.scaling.device, config.scaling.timeout_s)
    with ExitStack() as stack:
        stack.callback(ranks.leave)
        worker = Worker(config, ranks, _Driver())
        stack.callback(worker.close)
        batches = stack.enter_context(closing(worker.open_batches(first_batch=0)))
        loop = Loop(
            config=config,
            ranks=ranks,
            share=worker.share,
            players=worker.players,
            ema=worker.ema,
            batches=iter(batches),
            driver=_Driver(),
            on_log=lambda _step, metrics: finish_round(metrics),
            on_sample=lambda _step: None,
            on_save=lambda _step: None,
            skipped=worker.skipped,
            update_d=updates_d[0],
        )
        loop.run()
    return rounds


def measure_steps(config: TrainConfig) -> Report:
    """How fast a config trains, and how much of what the device can do that is.

    Args:
        config: as for `time_rounds`; the first round warms up.

    Returns:
        Medians over the rounds: images_per_s, time/data_s, time/d_s, time/g_s and time/other_s (seconds of a step);
        peak_memory_gib; flops_per_image (both updates, R1 at its frequency); matmul_flops_per_s, the device's own best;
        mfu, the share of it that the steps reach, in [0, 1].
    """
    rounds = time_rounds(config)
    names = ("images_per_s", "time/data_s", "time/d_s", "time/g_s", "time/other_s")
    report = {name: statistics.median(measured[name] for measured in rounds[1:]) for name in names}
    training, scaling = config.training, config.scaling
    device = torch.device("cuda" if scaling.device == "gpu" else "cpu")
    peak = matmul_flops_per_s(device, torch.bfloat16 if training.precision == "bf16" else torch.float32)
    interval = (training.r1_interval_steps or 1) if training.r1_gamma else None
    flops = measure_costs(config).flops_per_image(interval)
    return report | {
        "peak_memory_gib": rounds[-1]["peak_memory_gib"],
        "flops_per_image": flops,
        "matmul_flops_per_s": peak,
        "mfu": report["images_per_s"] * flops / peak,
    }


def compare_updates(config: TrainConfig) -> Report:
    """Our update of D and the authors', which also goes back through G, in turns on the same networks.

    Args:
        config: as for `time_rounds`, with the torch backend; the first round of each warms up.

    Returns:
        Medians over the rounds: images_per_s and authors_images_per_s; speedup, the median over pairs of rounds.
    """
    rates = [r["images_per_s"] for r in time_rounds(config, (update_discriminator, update_through_generator))][2:]
    ours, theirs = rates[::2], rates[1::2]
    return {
        "images_per_s": statistics.median(ours),
        "authors_images_per_s": statistics.median(theirs),
        "speedup": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def measure_sampling(config: TrainConfig, num_images: int) -> Report:
    """Draw images with fresh weights: the network's work is the same as with trained ones.

    Args:
        config: names the network; on a GPU it runs as with `trainer.sample --fast`.
        num_images: how many are timed, after a first batch.

    Returns:
        sampled_images_per_s.
    """
    prepare_torch(config)
    device = torch.device("cuda" if config.scaling.device == "gpu" else "cpu")
    generator = build_generator(config, device).eval().requires_grad_(False)
    diffusion = Diffusion.from_config(config.diffusion, device)
    draw = partial(sample_batches, generator, diffusion, config, seed=0, fast=device.type == "cuda")
    batches = draw(num=2**31)
    for _ in range(3):
        next(batches)
    began, done = time.perf_counter(), 0
    while done < num_images:
        done += len(next(batches))
    return {"sampled_images_per_s": done / (time.perf_counter() - began)}


def measure_pace(config: TrainConfig, *, images_per_s: float, seconds: float) -> Report:
    """Take this rank's micro-batches as the host of a device does: ask for the next while the device has the last.

    Args:
        config: its data section says how many loader processes read.
        images_per_s: rate of the device that is stood in for.
        seconds: how long, after the first micro-batch.

    Returns:
        images_per_s that was reached, waiting_share (of the time, in [0, 1]), longest_wait_s.
    """
    share = Share.of(config, 0, config.scaling.world_size)
    batches = open_batches(
        config.data,
        load_index(config.data.path),
        seed=config.run.seed,
        global_batch_size=share.global_batch_size,
        share=(share.start, share.stop),
        micro_batch_size=share.micro_batch_size,
        first_batch=0,
    )
    waits: list[float] = []
    with closing(batches):
        num_images = len(next(batches).images)  # the start of the loader processes is not counted
        began = time.perf_counter()
        free_at = began + num_images / images_per_s  # when the device is done with what it has
        while time.perf_counter() < began + seconds:
            count = len(next(batches).images)
            arrived = time.perf_counter()
            waits.append(max(0.0, arrived - free_at))
            started = max(arrived, free_at)
            free_at = started + count / images_per_s
            num_images += count
            time.sleep(max(0.0, started - time.perf_counter()))
    elapsed = free_at - began
    return {
        "images_per_s": num_images / elapsed,
        "waiting_share": sum(waits) / elapsed,
        "longest_wait_s": max(waits),
    }


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


if __name__ == "__main__":
    sys.exit(main())
