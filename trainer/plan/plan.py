"""The dry run: steps, arithmetic, memory and files of a run, computed without a GPU, Ray or the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.shards.index import load_index
from data.storage.location import DataError
from data.storage.redaction import redact
from models.diffusion import Diffusion
from trainer.algorithm.methods import make_method
from trainer.config.batch_split import BatchSplit
from trainer.config.stages import Stage, stages_of
from trainer.config.train_config import TrainConfig, num_steps, planned_precision, split_batch
from trainer.plan.cost import Costs, count_costs

FP32_BYTES = 4
OUTPUTS = ("checkpoints", "samples", "snapshots", "tracking")
"""Folders that a run creates in its directory."""


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes of one network's state on one rank at one ZeRO stage; all float32."""

    stage: int
    """ZeRO stage."""
    parameters: int
    """Parameters as used by the forward pass."""
    gradients: int
    """Gradients between backward and update. Their reduction at stages 1 to 3 needs a bucket on top."""
    adam: int
    """Both Adam moments."""
    master: int
    """The copy of its partition that DeepSpeed's optimizer updates at stages 1 to 3."""
    average: int
    """Moving averages; generator only."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.gradients + self.adam + self.master + self.average


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The length and cost of one stage of a run."""

    name: str
    """As in the config; empty if the run has one stage only."""
    num_steps: int
    """Number of its optimizer steps."""
    num_images: int
    """Number of its training images."""
    penalties: str
    """The penalties with a weight."""
    noise_levels: tuple[float, ...]
    """Sigma of each step's x_t, cleanest first."""
    x0_weights: tuple[float, ...]
    """Weight of x0_pred in x_tm1 at each step: what D can see of the generator's work."""
    costs: Costs
    """Network sizes and FLOPs."""

    @property
    def flops(self) -> float:
        """FLOPs of the stage, over all ranks."""
        return self.costs.flops_per_image * self.num_images


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size and cost of a run."""

    run_directory: Path
    """Where the run writes everything."""
    data_path: str
    """Where shards and index are read from."""
    num_samples: int | None
    """Number of images of the data set; None if its index cannot be read."""
    data_note: str
    """Why the index cannot be read; empty if it can."""
    batch: BatchSplit
    """How the global batch is split."""
    num_steps: int
    """Number of optimizer steps of the run."""
    precision: str
    """The precision of the computation; for `auto` also why."""
    recomputes: bool
    """Whether blocks are computed again in the backward pass."""
    records: bool
    """Whether a GPU records the updates, which then hold their memory."""
    stages: tuple[StagePlan, ...]
    """The stages of the run in their order; most runs have one."""
    zero_stage_g: int
    """ZeRO stage chosen for the generator."""
    zero_stage_d: int
    """ZeRO stage chosen for the discriminator."""
    memory_g: tuple[StateMemory, ...]
    """The generator's state on one rank at stages 0 to 3."""
    memory_d: tuple[StateMemory, ...]
    """The discriminator's state on one rank at stages 0 to 2."""
    checkpoint_bytes: int
    """Size of one checkpoint, for all ranks together."""
    keep_last: int
    """Number of checkpoints kept on disk; one more while a new one is written."""

    @property
    def num_images(self) -> int:
        """Number of training images of the run, in whole steps."""
        return self.num_steps * self.batch.global_batch_size

    @property
    def epochs(self) -> float | None:
        """Passes over the data set; None if its size is unknown."""
        return self.num_images / self.num_samples if self.num_samples else None

    @property
    def costs(self) -> Costs:
        """Network sizes and FLOPs of the last stage."""
        return self.stages[-1].costs

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, over all ranks."""
        return sum(stage.flops for stage in self.stages)

    @property
    def saved_bytes(self) -> int:
        """Most that a rank saves for a backward pass in any stage, in bytes; an estimate."""
        return max(stage.costs.saved_bytes for stage in self.stages)

    @property
    def state_bytes(self) -> int:
        """State of both networks on one rank at the chosen stages, in bytes."""
        return self.memory_g[self.zero_stage_g].total + self.memory_d[self.zero_stage_d].total


def make_plan(config: TrainConfig) -> Plan:
    """Compute the plan of a run. Missing data is noted, not refused."""
    num_samples, data_note = None, ""
    try:
        num_samples = load_index(config.data.path).num_samples
    except (DataError, OSError) as error:
        data_note = str(error)
    stages = tuple(map(_plan_stage, stages_of(config)))
    world_size = config.scaling.world_size
    size_g = stages[-1].costs.parameters_g  # in all stages
    size_d = max(stage.costs.parameters_d for stage in stages)
    learning_g, learning_d = (max(getattr(stage.costs, f"learning_{part}") for stage in stages) for part in ("g", "d"))
    num_averages = 1 + max(len(stage.config.training.power_ema.widths) for stage in stages_of(config))
    return Plan(
        run_directory=Path(config.run.directory),
        data_path=redact(config.data.path),
        num_samples=num_samples,
        data_note=data_note,
        batch=split_batch(config),
        num_steps=num_steps(config),
        precision=_precision(config),
        recomputes=config.engine.checkpoint_activations,
        records=config.engine.cuda_graphs and config.scaling.device == "gpu" and config.scaling.world_size == 1,
        stages=stages,
        zero_stage_g=config.engine.zero_stage_g,
        zero_stage_d=config.engine.zero_stage_d,
        memory_g=tuple(
            state_memory(size_g, stage, world_size, num_averages=num_averages, num_learning=learning_g)
            for stage in range(4)
        ),
        memory_d=tuple(
            state_memory(size_d, stage, world_size, num_averages=0, num_learning=learning_d) for stage in range(3)
        ),
        # Parameters and both moments of both networks, plus the generator's averages.
        checkpoint_bytes=FP32_BYTES * (size_g + size_d + 2 * (learning_g + learning_d) + num_averages * size_g),
        keep_last=config.checkpoint.keep_last,
    )


def _plan_stage(stage: Stage) -> StagePlan:
    config, num_steps = stage.config, stage.last_step - stage.first_step
    diffusion = Diffusion.from_config(config.diffusion)
    return StagePlan(
        name=stage.name,
        num_steps=num_steps,
        num_images=num_steps * config.training.global_batch_size,
        penalties=" and ".join(make_method(config.training, config.generator).penalties).upper(),
        noise_levels=tuple(diffusion.noise_levels.tolist()),
        x0_weights=tuple(diffusion.posterior_coef_x0.tolist()),
        costs=count_costs(config),
    )


def state_memory(
    num_parameters: int, stage: int, world_size: int, *, num_averages: int, num_learning: int | None = None
) -> StateMemory:
    """Bytes of one network's state on one rank.

    Args:
        num_parameters: of the network.
        stage: of ZeRO.
        world_size: number of ranks; the partition of each has the world_size-th part of the elements, rounded up.
        num_averages: moving averages of the network.
        num_learning: parameters that are not frozen; None: all of them.
    """
    learning = num_parameters if num_learning is None else num_learning
    part, part_learning = (FP32_BYTES * -(-number // world_size) for number in (num_parameters, learning))
    learning *= FP32_BYTES
    parameters = part if stage == 3 else FP32_BYTES * num_parameters
    return StateMemory(
        stage=stage,
        parameters=parameters,
        gradients=part_learning if stage >= 2 else learning,
        adam=2 * (part_learning if stage >= 1 else learning),
        master=part_learning if stage >= 1 else 0,
        average=num_averages * parameters,
    )


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    batch, costs = plan.batch, plan.costs
    epochs = f"{plan.epochs:,.4g} epochs of {plan.num_samples:,}" if plan.epochs else "epochs unknown, see data"
    lines = [
        "networks",
        f"  generator      {_millions(costs.parameters_g)}  {_flops(costs.forward_g):>13} forward, one image"
        + _frozen(costs.parameters_g, costs.learning_g),
        f"  discriminator  {_millions(costs.parameters_d)}  {_flops(costs.forward_d):>13} forward, one pair"
        + _frozen(costs.parameters_d, costs.learning_d),
        "batch",
        f"  {_batch(batch)}",
        "length",
        f"  {plan.num_steps:,} steps, {plan.num_images:,} images; {epochs}",
        f"  {_flops(plan.flops)}, over all ranks",
        f"  precision {plan.precision}",
        *(line for stage in plan.stages for line in _render_stage(stage)),
        "memory of one rank in GiB; * marks the stage chosen",
        "  network        ZeRO  parameters  gradients      Adam    master   average       sum",
        *(_row("generator", memory, plan.zero_stage_g) for memory in plan.memory_g),
        *(_row("discriminator", memory, plan.zero_stage_d) for memory in plan.memory_d),
        f"  saved for backward (estimate): generator's update {_gib(costs.update_g.saved_bytes)}, discriminator's "
        f"{_gib(costs.update_d.saved_bytes)}, with penalties {_gib(costs.update_d_penalized.saved_bytes)}",
        f"  together {_gib(plan.state_bytes)} + {_gib(plan.saved_bytes)} = "
        f"{_gib(plan.state_bytes + plan.saved_bytes)}; "
        "not included: workspaces of kernels, communication buckets, the processes themselves"
        + (", the activations of the one block that is computed again" if plan.recomputes else "")
        + (", what the CUDA graphs of both updates hold at the same time" if plan.records else ""),
        "checkpoint",
        f"  {_gib(plan.checkpoint_bytes)} GiB each, {plan.keep_last} kept and one more while writing: "
        f"{_gib(plan.checkpoint_bytes * (plan.keep_last + 1))} GiB of disk",
        "files",
        f"  reads   {plan.data_path}" + (f" (not readable yet: {plan.data_note})" if plan.data_note else ""),
        f"  writes  {redact(str(plan.run_directory))}/ with {', '.join(OUTPUTS)}",
    ]
    return "\n".join(lines)


def _render_stage(stage: StagePlan) -> list[str]:
    costs = stage.costs
    heading = f"stage {stage.name}: {stage.num_steps:,} steps, {stage.num_images:,} images, {_flops(stage.flops)}"
    return [
        *([heading] if stage.name else []),
        "steps of denoising",
        f"  noise level sigma of x_t       {_levels(stage.noise_levels)}",
        f"  weight of x0_pred in x_tm1     {_levels(stage.x0_weights)}",
        "arithmetic",
        f"  {_flops(costs.flops_per_image)} an image: generator's update {_flops(costs.update_g.flops_per_image)}, "
        f"discriminator's {_flops(costs.update_d.flops_per_image)}, {_penalties(stage)}",
        f"  {_flops(stage.flops / stage.num_steps)} a step",
    ]


def _precision(config: TrainConfig) -> str:
    chosen, planned = config.training.precision, planned_precision(config)
    if chosen != "auto":
        return chosen
    if config.scaling.device == "cpu":
        return f"auto: {planned} on the CPU"
    if torch.cuda.is_available():
        return f"auto: {planned} on the GPU of this machine, {torch.cuda.get_device_name(0)}"
    return f"auto: {planned} on a GPU that has it, otherwise fp32; this machine has no GPU"


def _batch(batch: BatchSplit) -> str:
    sizes = [stop - start for start, stop in map(batch.share, range(batch.world_size))]
    fullest = sizes.count(batch.rank_batch_size)
    if batch.micro_batch_size * batch.grad_accum_steps * batch.world_size == batch.global_batch_size:
        return (
            f"{batch.global_batch_size} images a step = micro {batch.micro_batch_size} x accum "
            f"{batch.grad_accum_steps} x world {batch.world_size}; {batch.rank_batch_size} on each rank"
        )
    spread = f"{fullest} x {sizes[0]}" + (f" + {len(sizes) - fullest} x {sizes[-1]}" if sizes[-1] < sizes[0] else "")
    return (
        f"{batch.global_batch_size} images a step = {spread} over the ranks, in whole groups of {batch.group_size}; "
        f"micro {batch.micro_batch_size} or less x accum {batch.grad_accum_steps} on each rank"
    )


def _levels(values: Sequence[float]) -> str:
    """One number for each step; of many steps the first and the last two."""
    words = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in values]
    return ", ".join(words if len(words) <= 16 else [*words[:2], "...", *words[-2:]])


def _penalties(stage: StagePlan) -> str:
    if not stage.costs.parameters_d:
        return "there is none"
    interval = stage.costs.penalty_interval_steps
    if interval is None:
        return "without penalties"
    often = "at every step" if interval == 1 else f"at 1 step in {interval}"
    return f"{stage.penalties} {_flops(stage.costs.penalty_flops_per_image)} {often}"


def _row(name: str, memory: StateMemory, chosen: int) -> str:
    parts = (memory.parameters, memory.gradients, memory.adam, memory.master, memory.average, memory.total)
    widths = (12, 11, 10, 10, 10, 10)
    cells = "".join(f"{_gib(part):>{width}}" for part, width in zip(parts, widths, strict=True))
    return f"  {name:<15}{memory.stage}{'*' if memory.stage == chosen else ' '}  {cells}"


def _millions(count: int) -> str:
    return f"{count / 1e6:8.2f} M parameters"


def _frozen(held: int, learning: int) -> str:
    return f"; {100 * (held - learning) / held:.1f}% of the parameters are frozen" if learning < held else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f}"


def _flops(flops: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= scale:
            return f"{flops / scale:,.2f} {unit}"
    return f"{flops / 1e9:,.2f} GFLOP"
