"""Times whole training steps, and the peak of a device."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from data.shards.index import load_index
from trainer.algorithm.method import Method
from trainer.algorithm.methods import make_method
from trainer.bench.steps.authors_update import AuthorsAdversarial
from trainer.config.stages import only_stage, stages_of
from trainer.config.train_config import TrainConfig, planned_precision
from trainer.engine.ranks import Ranks
from trainer.plan.cost import count_costs
from trainer.rank.build import build, settle_precision
from trainer.rank.loop import Loop
from trainer.rank.progress import RunStatus
from trainer.rank.step.share import Share, open_share
from trainer.rank.worker import prepare_torch

Report = dict[str, float]
TIMES = ("time/data_s", "time/d_s", "time/g_s", "time/other_s")
"""Of the loop's measurements, the parts of a step; a denoiser has no update of D."""


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
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. A process joins only once: several loops share them."""
    ranks = Ranks.join(config.scaling.device, config.scaling.timeout_s)
    try:
        yield ranks
    finally:
        ranks.leave()


@contextmanager
def open_loop(config: TrainConfig, ranks: Ranks | None = None, *, nchw: bool = False) -> Iterator[Loop]:
    """A loop of whole steps on this rank: data, both updates, R1, optimizer and average; no checkpoints or grids.

    Args:
        config: of one stage, for these ranks.
        ranks: those of `joined`; None: join them for this loop.
        nchw: use the layout that torch starts from, whatever the device's best is.
    """
    prepare_torch(config)
    with ExitStack() as stack:
        ranks = ranks or stack.enter_context(joined(config))
        config = settle_precision(config, ranks)
        learner = build(config, ranks, memory_format=torch.contiguous_format if nchw else None)
        stack.callback(learner.close)
        share, pin = Share.of(config, ranks.rank, ranks.world_size), ranks.device.type == "cuda"
        batches = stack.enter_context(closing(open_share(config, load_index(config.data.path), share, 0, pin=pin)))
        stage = only_stage(config)
        yield Loop(stage=stage, ranks=ranks, share=share, learner=learner, batches=iter(batches), driver=_Driver())


def time_rounds(
    config: TrainConfig, methods: Sequence[Method[Any]] = (), *, ranks: Ranks | None = None, nchw: bool = False
) -> list[Report]:
    """Time whole steps, with R1 at its own frequency.

    Args:
        config: as in `open_loop`. Each of its log intervals is a round.
        methods: used in turn, one per round; empty: the config's.
        ranks, nchw: as in `open_loop`.

    Returns:
        The loop's measurements, per round; those of the first also have first_step_s, the seconds from the start of
        the building to the end of the first step, compilation included.
    """
    rounds: list[Report] = []
    began, first_step_s = time.perf_counter(), 0.0
    with open_loop(config, ranks, nchw=nchw) as loop:
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


def time_steps(
    config: TrainConfig, flops_per_image: float | None = None, *, ranks: Ranks | None = None, nchw: bool = False
) -> Report:
    """Measure how fast a stage trains, and the share of the device's peak that it reaches.

    Args:
        config: as in `time_rounds`; the first round is a warm-up.
        flops_per_image: FLOPs of both updates per image; None: count them, which takes seconds.
        ranks, nchw: as in `open_loop`.

    Returns:
        Medians over the rounds: images_per_s, time/data_s, time/d_s (if there is a D), time/g_s and time/other_s
        (seconds of a step);
        first_step_s, as in `time_rounds`; peak_memory_gib of this rank; flops_per_image (both updates, R1 at its
        frequency); matmul_flops_per_s, the device's measured peak; mfu, the share of it that the steps reach, in [0,
        1].
    """
    rounds = time_rounds(config, ranks=ranks, nchw=nchw)
    names = ["images_per_s", *(name for name in TIMES if name in rounds[-1])]
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
    """FLOPs of both updates per image, the penalties at their frequency; of several stages the mean of their images."""
    stages, images = stages_of(config), config.training.total_images
    if len(stages) == 1:
        return count_costs(config).flops_per_image
    return sum(count_costs(s.config).flops_per_image * s.config.training.total_images / images for s in stages)


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
