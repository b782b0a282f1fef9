"""How long a run takes on a GPU that is not at hand, from the FLOPs and the bytes of a step: a bound and an estimate.

The lower bound is that of a roofline: for each kind of operation the longer of FLOPs / peak and bytes / bandwidth,
summed over the kinds. No program with these operations can be faster, unless tensors stay in a cache between two of
them.

The estimate is the same with shares of the peaks, and not less than the time that the host needs to start the
operations. The shares are assumptions; nothing here was measured.
"""

from dataclasses import dataclass

import torch

from trainer.config.stages import stages_of
from trainer.config.train_config import TrainConfig
from trainer.plan.bytes_moved import Traffic
from trainer.plan.gpus import Gpu, Precision
from trainer.plan.plan import Plan
from trainer.plan.step_traffic import count_step

COMPUTE_SHARE = 0.6
"""Share of the peak in convolutions and matrix products. Large matrix products reach about 0.7 on current GPUs,
convolutions of few channels less."""
MEMORY_SHARE = 0.8
"""Share of the bandwidth. Copies of large tensors reach about 0.9, reductions and small tensors less."""
HOST_S = 6e-6
"""Seconds in which the host starts one operation of eager torch, autograd included."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How long a run takes on one kind of GPU. Pairs are (lower bound of the time, estimate)."""

    gpu: Gpu
    """The GPU of each rank."""
    precision: Precision
    """Precision of the run."""
    plan: Plan
    """The plan of the run."""
    step_s: tuple[tuple[float, float], ...]
    """Seconds of a step in each stage, with the penalties at their interval."""
    fused: bool
    """Whether the fused operators are counted, or plain torch."""

    @property
    def images_per_s(self) -> tuple[float, float]:
        """Training images per second of all ranks, over the whole run."""
        bound, estimate = (self.plan.num_images / 3600 / hours for hours in self.hours)
        return bound, estimate

    @property
    def mfu(self) -> tuple[float, float]:
        """Share of the GPUs' peak at this precision, in [0, 1]."""
        peak = self.plan.batch.world_size * self.gpu.flops_per_s(self.precision)
        bound, estimate = (self.plan.flops / 3600 / hours / peak for hours in self.hours)
        return bound, estimate

    @property
    def hours(self) -> tuple[float, float]:
        """Hours of the whole run."""
        steps = [stage.num_steps for stage in self.plan.stages]
        bound, estimate = (
            sum(n * s for n, s in zip(steps, seconds, strict=True)) / 3600 for seconds in zip(*self.step_s, strict=True)
        )
        return bound, estimate

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """Hours of the whole run times the number of GPUs."""
        bound, estimate = (self.plan.batch.world_size * hours for hours in self.hours)
        return bound, estimate

    @property
    def memory_gb(self) -> float:
        """What the plan needs of a GPU's memory, in 10^9 bytes."""
        return (self.plan.state_bytes + self.plan.saved_bytes) / 1e9


def predict(config: TrainConfig, plan: Plan, gpu: Gpu, precision: Precision) -> Prediction:
    """Predict a run; takes seconds.

    Args:
        config: config of the run, except its precision.
        plan: its plan.
        gpu: the GPU of each rank.
        precision: precision of the run.
    """
    how = {"bf16": precision == "bf16", "fuses": config.engine.fused}
    steps = [count_step(stage.config, **how).whole for stage in stages_of(config)]
    seconds = tuple(step_seconds(traffic, gpu, precision) for traffic in steps)
    return Prediction(gpu=gpu, precision=precision, plan=plan, step_s=seconds, fused=config.engine.fused)


def step_seconds(traffic: Traffic, gpu: Gpu, precision: Precision) -> tuple[float, float]:
    """Lower bound and estimate of the time of a step.

    Args:
        traffic: the step's operations by kind.
        gpu: where they run.
        precision: decides how fast float32 products are; those of tf32 and bf16 runs are in TF32.
    """
    of_float: Precision = "fp32" if precision == "fp32" else "tf32"
    bound = estimate = 0.0
    for moved in traffic.values():
        computing = sum(
            flops / gpu.flops_per_s("bf16" if dtype == torch.bfloat16 else of_float)
            for dtype, flops in moved.flops.items()
        )
        moving = moved.total / (1e9 * gpu.gb_per_s)
        bound += max(computing, moving)
        estimate += max(computing / COMPUTE_SHARE, moving / MEMORY_SHARE)
    return bound, max(estimate, HOST_S * sum(moved.num_operations for moved in traffic.values()))


def render_prediction(prediction: Prediction, usd_per_gpu_hour: float | None = None) -> str:
    """The prediction as text for a terminal."""
    p = prediction
    rows = [
        *(
            (f"seconds of a step{f', stage {stage.name}' if stage.name else ''}", seconds, ".4f")
            for stage, seconds in zip(p.plan.stages, p.step_s, strict=True)
        ),
        ("images/s", p.images_per_s, ",.0f"),
        ("MFU in per cent", (100 * p.mfu[0], 100 * p.mfu[1]), ".1f"),
        ("hours of the whole run", p.hours, ",.1f"),
        ("GPU-hours", p.gpu_hours, ",.1f"),
    ]
    if usd_per_gpu_hour is not None:
        bound, estimate = (usd_per_gpu_hour * hours for hours in p.gpu_hours)
        rows.append((f"USD, at {usd_per_gpu_hour:,.2f} a GPU-hour", (bound, estimate), ",.0f"))
    width = max(32, *(len(name) for name, _, _ in rows))
    fits = p.memory_gb <= p.gpu.memory_gb
    return "\n".join(
        [
            f"prediction for {p.plan.batch.world_size} x {p.gpu.title} in {p.precision}, with "
            f"{'fused operators' if p.fused else 'plain torch'}; nothing of it was measured",
            f"  {'':<{width}}{'at best':>12}{'estimate':>12}",
            *(f"  {name:<{width}}{best:>12{form}}{estimate:>12{form}}" for name, (best, estimate), form in rows),
            "  At best: the peaks of the data sheet. Estimate, by assumption:",
            f"  {COMPUTE_SHARE:.0%} of the FLOP/s, {MEMORY_SHARE:.0%} of the bandwidth, {HOST_S * 1e6:.0f} us of the "
            "host for an operation.",
            "  Not included: reading the data, sums of gradients over the GPUs, checkpoints, grids, evaluations.",
            f"  Memory: {p.memory_gb:,.1f} GB planned, the GPU has {p.gpu.memory_gb:,.0f} GB"
            + ("" if fits else ": IT DOES NOT FIT. Lower training.micro_batch_size, or raise engine.zero_stage_g"),
        ]
    )
