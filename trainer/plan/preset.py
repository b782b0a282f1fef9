"""Settings of a config for GPUs of a given memory: `--gpus 1 --gpu-memory 24`.

The micro-batch is the largest whose plan fits, so that the passes of a step are few. Global batch, losses and draws
stay those of the config: what is trained is the same, up to the order of float sums and the precision of `auto`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from data.storage.arguments import whole_number
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, planned_precision, split_batch
from trainer.plan.plan import Plan, make_plan

PLANNED_SHARE = 0.8
"""Share of a GPU's memory that a plan may fill. The rest is for what a plan does not count: workspaces of kernels,
buckets, CUDA itself, fragments. It is an assumption."""
_MICRO, _PRECISION = "training.micro_batch_size", "training.precision"
_WORLD, _FEWEST, _DEVICE = "scaling.world_size", "scaling.min_world_size", "scaling.device"
_RECOMPUTE = "engine.checkpoint_activations"


@dataclass(frozen=True)
class Preset:
    """A config for some GPUs.

    Attributes:
        config: with the chosen settings.
        plan: of that config.
        words: what was chosen and why, for a terminal.
    """

    config: TrainConfig
    plan: Plan
    words: str


def add_preset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that fit a config to GPUs."""
    parser.add_argument(
        "--gpus", type=whole_number(1), metavar="N", help="train on N GPUs: chooses the settings that fit their memory"
    )
    parser.add_argument(
        "--gpu-memory",
        type=whole_number(1, 10_000),
        metavar="GB",
        help="with --gpus: memory of each, in 10^9 bytes; left out: that of this machine's first GPU",
    )


def preset_words(options: argparse.Namespace) -> list[str]:
    """The arguments of `add_preset_arguments` as they were given, to hand them on."""
    given = {"--gpus": options.gpus, "--gpu-memory": options.gpu_memory}
    return [word for name, value in given.items() if value is not None for word in (name, str(value))]


def make_preset(name: str, overrides: Sequence[str], options: argparse.Namespace) -> Preset | None:
    """Choose settings; takes seconds, and none the second time in a process.

    Args:
        name: of the config, as `load_config` takes it.
        overrides: of the user; what they set is not chosen.
        options: with `gpus` and `gpu_memory`.

    Returns:
        None if no preset is asked for.

    Raises:
        ConfigError: the config is wrong, contradicts the arguments, or fits in no way; says what would.
    """
    if options.gpus is None:
        if options.gpu_memory is not None:
            raise ConfigError(["--gpu-memory is given without --gpus: add --gpus 1, or leave --gpu-memory out"])
        return None
    memory_gb = options.gpu_memory
    if memory_gb is None:
        if not torch.cuda.is_available():
            raise ConfigError(
                ["--gpus is given, but this machine has no GPU to ask for its memory: add --gpu-memory, such as 24"]
            )
        memory_gb = int(torch.cuda.get_device_properties(0).total_memory / 1e9)
    return _chosen(name, tuple(overrides), options.gpus, memory_gb)


@cache
def _chosen(name: str, overrides: tuple[str, ...], gpus: int, memory_gb: int) -> Preset:
    given = {text.partition("=")[0].strip() for text in overrides}
    config = load_config(name, [*overrides, *_for_gpus(name, overrides, given, gpus)])
    budget = PLANNED_SHARE * memory_gb * 1e9
    precision = planned_precision(config)
    config = _with(config, "training", precision=precision)

    ways = [config]
    if _RECOMPUTE not in given and 3 not in (config.engine.zero_stage_g, config.engine.zero_stage_d):
        ways.append(_with(config, "engine", checkpoint_activations=True))
    tried: list[Plan] = []
    sizes = _sizes(config, given)
    if config.discriminator.stddev_grouping == "strided" and _MICRO not in given:
        # The images of a forward pass are compared with each other there, so that their number is not ours to choose.
        sizes = [split_batch(load_config(name, overrides)).micro_batch_size]
    for way in ways:
        if found := _largest(way, sizes, budget, tried):
            fitting, plan = found
            return Preset(fitting, plan, _words(fitting, plan, tried, given, gpus, memory_gb))
    raise ConfigError([_refusal(config, tried, given, gpus, memory_gb)])


def _for_gpus(name: str, overrides: Sequence[str], given: set[str], gpus: int) -> Iterator[str]:
    """Overrides that put the ranks on GPUs.

    Raises:
        ConfigError: the user's own contradict them.
    """
    asked = {text.partition("=")[0].strip(): text.partition("=")[2].strip() for text in overrides}
    for setting, value in ((_WORLD, str(gpus)), (_DEVICE, "gpu")):
        if asked.get(setting, value) != value:
            raise ConfigError(
                [f"--gpus is {gpus}, but --set {setting}={asked[setting]} is given: leave one of them out"]
            )
        yield f"{setting}={value}"
    if _FEWEST not in given:
        yield f"{_FEWEST}=null"


def _sizes(config: TrainConfig, given: set[str]) -> list[int]:
    """The micro-batches to choose from, largest first: one for each number of passes."""
    split = split_batch(config)
    if _MICRO in given:
        return [split.micro_batch_size]
    groups = split.rank_batch_size // split.group_size
    passes = range(1, groups + 1)
    return sorted({-(-groups // number) * split.group_size for number in passes}, reverse=True)


def _largest(
    config: TrainConfig, sizes: list[int], budget: float, tried: list[Plan]
) -> tuple[TrainConfig, Plan] | None:
    """The config with the largest micro-batch whose plan fits, and that plan. Adds every plan to `tried`."""
    left = sizes
    while left:
        candidate = _with(config, "training", micro_batch_size=left[0])
        plan = make_plan(candidate)
        tried.append(plan)
        if _needed(plan) <= budget:
            return candidate, plan
        # What is saved is nearly proportional to the images, but not less: the next plan decides.
        fitting = (budget - plan.state_bytes) / plan.saved_bytes * left[0]
        left = [size for size in left[1:] if size <= fitting] or left[1:][-1:]
    return None


def _needed(plan: Plan) -> int:
    return plan.state_bytes + plan.saved_bytes


def _with(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _words(config: TrainConfig, plan: Plan, tried: Sequence[Plan], given: set[str], gpus: int, memory_gb: int) -> str:
    split = plan.batch
    passes = f"{split.grad_accum_steps} pass{'es' * (split.grad_accum_steps > 1)}"
    why_micro = f"{passes} for the {split.rank_batch_size} images of a rank"
    if _MICRO in given:
        why_micro += "; yours, and it fits"
    elif config.discriminator.stddev_grouping == "strided":
        why_micro += "; strided groups keep the config's"
    elif refused := [other for other in tried if other.recomputes == plan.recomputes and other is not plan]:
        least = min(refused, key=_needed)
        why_micro += f"; {least.batch.micro_batch_size} would take {_gb(_needed(least))} GB"
    lines = [
        f"settings for {gpus} GPU{'s' * (gpus > 1)} of {memory_gb} GB",
        f"  {_WORLD}={gpus}; the global batch stays {split.global_batch_size}",
        f"  {_MICRO}={split.micro_batch_size}: {why_micro}",
        f"  {_PRECISION}={config.training.precision}: {_why_precision(config, given)}",
    ]
    if plan.recomputes and _RECOMPUTE not in given and not tried[0].recomputes:
        least = min(_needed(other) for other in tried if not other.recomputes)
        lines.append(f"  {_RECOMPUTE}=true: without it the plan takes at least {_gb(least)} GB")
    lines.append(
        f"  planned {_gb(_needed(plan))} of {memory_gb} GB; {1 - PLANNED_SHARE:.0%} are left free for what a plan does "
        "not count"
    )
    return "\n".join(lines)


def _why_precision(config: TrainConfig, given: set[str]) -> str:
    if _PRECISION in given:
        return "yours"
    if torch.cuda.is_available():
        return f"the config's, or what {torch.cuda.get_device_name(0)} has"
    return "the config's" if config.training.precision != "bf16" else "for GPUs of compute capability 8.0 and higher"


def _refusal(config: TrainConfig, tried: Sequence[Plan], given: set[str], gpus: int, memory_gb: int) -> str:
    least = min(tried, key=_needed)
    wanted = -(-_needed(least) // int(PLANNED_SHARE * 1e9))
    size = least.batch.micro_batch_size
    what = f"{memory_gb} GB of GPU memory are too little: {size} images in a pass are planned with "
    what += (
        f"{_gb(_needed(least))} GB, and {PLANNED_SHARE:.0%} of the memory may be planned: give GPUs of {wanted} GB or "
    )
    what += "more"
    advice = []
    if _MICRO in given:
        advice.append(f"leave --set {_MICRO} out, which lets a smaller one be chosen")
    if _RECOMPUTE in given and not config.engine.checkpoint_activations:
        advice.append(f"leave --set {_RECOMPUTE} out")
    if gpus > 1 and not config.engine.zero_stage_g:
        advice.append("set engine.zero_stage_g and engine.zero_stage_d to 2")
    if not advice and _PRECISION in given and config.training.precision != "bf16":
        advice.append(f"leave --set {_PRECISION} out")
    return ", or ".join([what, *advice])


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f}"
