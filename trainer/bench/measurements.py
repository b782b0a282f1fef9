"""How fast steps, sampling and reading are."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch

from data.shards.index import load_index
from models.diffusion import Diffusion
from trainer.algorithm.method import Method
from trainer.algorithm.methods import make_method
from trainer.bench.authors_update import AuthorsAdversarial
from trainer.checkpoint.snapshot import build_generator
from trainer.config.cost import measure_costs
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.rank.build import build
from trainer.rank.loop import Loop, Share, open_share
from trainer.rank.progress import RunStatus
from trainer.rank.worker import prepare_torch
from trainer.sample.draw import sample_batches

Report = dict[str, float]


class _Driver:
    """Neither reports nor stops."""

    def report(self, status: RunStatus) -> None:
        """Nobody looks."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


def time_rounds(config: TrainConfig, methods: Sequence[Method[Any]] = ()) -> list[Report]:
    """Time whole steps: data, both updates, R1 at its own frequency, optimizer and average; no checkpoint, no grid.

    Args:
        config: of one rank. Each of its log intervals is a round.
        methods: take turns, one a round; none: the config's own.

    Returns:
        What the loop measures, round by round.
    """
    rounds: list[Report] = []
    prepare_torch(config)
    ranks = Ranks.join(config.scaling.device, config.scaling.timeout_s)
    with ExitStack() as stack:
        stack.callback(ranks.leave)
        learner = build(config, ranks)
        stack.callback(learner.close)
        share, pin = Share.of(config, 0, 1), ranks.device.type == "cuda"
        batches = stack.enter_context(closing(open_share(config, load_index(config.data.path), share, 0, pin=pin)))
        loop = Loop(config=config, ranks=ranks, share=share, learner=learner, batches=iter(batches), driver=_Driver())
        while loop.step < loop.num_steps:
            if methods:
                loop.method = methods[len(rounds) % len(methods)]
            loop.run(loop.step + config.tracking.log_interval_steps)
            rounds.append(loop.measure())
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
    ours, theirs = (
        make_method(config.training, config.generator),
        AuthorsAdversarial.of(config.training, config.generator),
    )
    rates = [r["images_per_s"] for r in time_rounds(config, (ours, theirs))][2:]
    of_ours, of_theirs = rates[::2], rates[1::2]
    return {
        "images_per_s": statistics.median(of_ours),
        "authors_images_per_s": statistics.median(of_theirs),
        "speedup": statistics.median(a / b for a, b in zip(of_ours, of_theirs, strict=True)),
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
    batches = open_share(config, load_index(config.data.path), share, 0, pin=False)
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


_SIZES = {"cuda": 8192, "cpu": 1024}


_ROUNDS = 10


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second, two for a multiply-add, of the fastest of some square matrix products.

    Args:
        device: with the number of threads and the number formats that are set.
        dtype: of the factors.
    """
    size = _SIZES.get(device.type, 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest_s = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * size**3 / fastest_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
