"""Speed of training steps, sampling and reading."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch

from data.shards.index import load_index
from models.diffusion import Diffusion
from trainer.algorithm.method import Method
from trainer.algorithm.methods import make_method
from trainer.bench.authors_update import AuthorsAdversarial
from trainer.checkpoint.snapshot import build_generator
from trainer.config.stages import only_stage
from trainer.config.train_config import TrainConfig, planned_precision
from trainer.engine.ranks import Ranks
from trainer.plan.cost import count_costs
from trainer.rank.build import build, settle_precision
from trainer.rank.loop import Loop
from trainer.rank.progress import RunStatus
from trainer.rank.step.share import Share, open_share
from trainer.rank.worker import prepare_torch
from trainer.sample.draw import sample_batches

Report = dict[str, float]


class _Driver:
    """A driver that neither reports nor stops."""

    def report(self, status: RunStatus) -> None:
        """Do nothing."""

    def show(self, curves: Mapping[str, float]) -> None:
        """Do nothing."""

    def stop_requested(self) -> bool:
        """Always False."""
        return False


@contextmanager
def open_loop(config: TrainConfig, *, nchw: bool = False) -> Iterator[Loop]:
    """A loop of whole steps on this rank: data, both updates, R1, optimizer and average; no checkpoints or grids.

    Args:
        config: for the ranks that torchrun started, or for this process alone.
        nchw: use the layout that torch starts from, whatever the device's best is.
    """
    prepare_torch(config)
    ranks = Ranks.join(config.scaling.device, config.scaling.timeout_s)
    with ExitStack() as stack:
        stack.callback(ranks.leave)
        config = settle_precision(config, ranks)
        learner = build(config, ranks, memory_format=torch.contiguous_format if nchw else None)
        stack.callback(learner.close)
        share, pin = Share.of(config, ranks.rank, ranks.world_size), ranks.device.type == "cuda"
        batches = stack.enter_context(closing(open_share(config, load_index(config.data.path), share, 0, pin=pin)))
        stage = only_stage(config)
        yield Loop(stage=stage, ranks=ranks, share=share, learner=learner, batches=iter(batches), driver=_Driver())


def time_rounds(config: TrainConfig, methods: Sequence[Method[Any]] = (), *, nchw: bool = False) -> list[Report]:
    """Time whole steps, with R1 at its own frequency.

    Args:
        config: as in `open_loop`. Each of its log intervals is a round.
        methods: used in turn, one per round; empty: the config's.
        nchw: as in `open_loop`.

    Returns:
        The loop's measurements, per round; those of the first also have first_step_s, the seconds from the start of
        the building to the end of the first step, compilation included.
    """
    rounds: list[Report] = []
    began, first_step_s = time.perf_counter(), 0.0
    with open_loop(config, nchw=nchw) as loop:
        while loop.step < loop.stage.last_step:
            last = loop.step + config.tracking.log_interval_steps
            if methods:
                loop.method = methods[len(rounds) % len(methods)]
            if not loop.step:
                loop.run(1)
                _wait(loop.ranks.device)
                first_step_s = time.perf_counter() - began
            loop.run(last)
            rounds.append(loop.take_metrics())
    rounds[0]["first_step_s"] = first_step_s
    return rounds


def time_steps(config: TrainConfig, flops_per_image: float | None = None, *, nchw: bool = False) -> Report:
    """Measure how fast a config trains, and the share of the device's peak that it reaches.

    Args:
        config: as in `time_rounds`; the first round is a warm-up.
        flops_per_image: FLOPs of both updates per image; None: count them, which takes seconds.
        nchw: as in `open_loop`.

    Returns:
        Medians over the rounds: images_per_s, time/data_s, time/d_s, time/g_s and time/other_s (seconds of a step);
        first_step_s, as in `time_rounds`; peak_memory_gib of this rank; flops_per_image (both updates, R1 at its
        frequency); matmul_flops_per_s, the device's measured peak; mfu, the share of it that the steps reach, in [0,
        1].
    """
    rounds = time_rounds(config, nchw=nchw)
    names = ("images_per_s", "time/data_s", "time/d_s", "time/g_s", "time/other_s")
    report = {name: statistics.median(measured[name] for measured in rounds[1:]) for name in names}
    scaling = config.scaling
    device = torch.device("cuda" if scaling.device == "gpu" else "cpu")
    peak = matmul_flops_per_s(device, torch.bfloat16 if planned_precision(config) == "bf16" else torch.float32)
    peak *= scaling.world_size  # every rank measures its own at the same time
    flops = flops_per_image or count_flops(config)
    return report | {
        "first_step_s": rounds[0]["first_step_s"],
        "peak_memory_gib": rounds[-1]["peak_memory_gib"],
        "flops_per_image": flops,
        "matmul_flops_per_s": peak,
        "mfu": report["images_per_s"] * flops / peak,
    }


def count_flops(config: TrainConfig) -> float:
    """FLOPs of both updates per image, the penalties at their frequency."""
    return count_costs(config).flops_per_image


def compare_updates(config: TrainConfig, *, nchw: bool = False) -> Report:
    """Our update of D and the authors', which also backpropagates through G, alternating on the same networks.

    Args:
        config: as in `time_rounds`, with the torch backend; the first round of each update is a warm-up.
        nchw: as in `open_loop`.

    Returns:
        Medians over the rounds: images_per_s and authors_images_per_s; speedup, the median over pairs of rounds.
    """
    ours, theirs = (
        make_method(config.training, config.generator),
        AuthorsAdversarial.of(config.training, config.generator),
    )
    rates = [r["images_per_s"] for r in time_rounds(config, (ours, theirs), nchw=nchw)][2:]
    of_ours, of_theirs = rates[::2], rates[1::2]
    return {
        "images_per_s": statistics.median(of_ours),
        "authors_images_per_s": statistics.median(of_theirs),
        "speedup": statistics.median(a / b for a, b in zip(of_ours, of_theirs, strict=True)),
    }


def time_sampling(config: TrainConfig, num_images: int) -> Report:
    """Sample with fresh weights: the network does the same work as with trained ones.

    Args:
        config: the network's config; on a GPU it runs as with `trainer.sample --fast`.
        num_images: number of images timed, after a first batch.

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


def time_reading(config: TrainConfig, *, images_per_s: float, seconds: float) -> Report:
    """Read one rank's micro-batches at a device's pace: ask for the next one while the device processes the last.

    Args:
        config: its data section sets the number of loader processes.
        images_per_s: rate of the simulated device.
        seconds: duration, after the first micro-batch.

    Returns:
        images_per_s reached, waiting_share (of the time, in [0, 1]), longest_wait_s.
    """
    share = Share.of(config, 0, config.scaling.world_size)
    batches = open_share(config, load_index(config.data.path), share, 0, pin=False)
    waits: list[float] = []
    with closing(batches):
        num_images = len(next(batches).images)  # excludes the start of the loader processes
        began = time.perf_counter()
        free_at = began + num_images / images_per_s  # when the device has processed its images
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
    """Floating-point operations per second, two per multiply-add, of the fastest of several square matrix products.

    Args:
        device: used with the current number of threads and number formats.
        dtype: dtype of the factors.
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
