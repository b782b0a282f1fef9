"""What is tried, in the order of the expected gain. A value that the config's classes do not know is left out."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.bench.ladder import allowed
from trainer.bench.steps.timing import Report
from trainer.config.train_config import TrainConfig, split_batch

Settings = Mapping[str, Any]
"""Values of settings by dotted name."""


@dataclass(frozen=True)
class Machine:
    """What there is to choose from.

    Attributes:
        cpus: that this process may use.
        gpus: that torch finds.
        bf16_on_cpu: whether its CPUs multiply bfloat16; others would take several times as long for it.
    """

    cpus: int
    gpus: int
    bf16_on_cpu: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """This machine."""
        able = torch.cpu.get_capabilities()
        bf16_on_cpu = any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))
        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count(), bf16_on_cpu)

    def ranks(self, config: TrainConfig) -> int:
        """Ranks that are measured: all of them, or one with its share of the batch if there are too few GPUs."""
        world_size = config.scaling.world_size
        return world_size if config.scaling.device == "cpu" or world_size <= self.gpus else 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A choice.

    Attributes:
        name: in words.
        values: the settings to try, given the best config so far and what was measured with it.
        on_gpu: whether it is tried on GPUs.
        on_cpu: whether it is tried on CPUs.
    """

    name: str
    values: Callable[[TrainConfig, Machine, Report], Iterator[Settings]]
    on_gpu: bool = True
    on_cpu: bool = True


CHANGE_THE_RESULT = frozenset({"training.precision"})
"""Settings that change what training computes. The others change only the order of floating-point sums."""


def _each(name: str, *values: Any) -> Callable[[TrainConfig, Machine, Report], Iterator[Settings]]:
    return lambda config, machine, best: ({name: value} for value in values)


def _number_formats(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """On a CPU, bfloat16 is faster for wide networks and slower for narrow ones."""
    if config.scaling.device == "gpu":
        yield from ({"training.precision": precision} for precision in ("bf16", "tf32"))
    elif machine.bf16_on_cpu:
        yield {"training.precision": "bf16"}


def _ranks_and_threads(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """All CPUs, shared by 1, 2, 4, ... ranks; then half as many threads, which leaves CPUs to the loaders."""
    for threads_of in (machine.cpus, machine.cpus // 2):
        ranks = 1
        while ranks <= threads_of:
            yield {
                "scaling.world_size": ranks,
                "scaling.min_world_size": None,
                "scaling.cpus_per_worker": threads_of // ranks,
            }
            ranks *= 2


def _micro_batches(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """All images of a rank at once, a half, a quarter, and an eighth of them; the current one is tried already."""
    if config.discriminator.stddev_grouping == "strided":  # its groups, and so the result, depend on the micro-batch
        return
    split = split_batch(config)
    for parts in (1, 2, 4, 8):
        size = split.rank_batch_size // parts // split.group_size * split.group_size
        if size:
            yield {"training.micro_batch_size": size if parts > 1 else None}


def _cuda_graphs(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """Only the plain engine has them, and for a run of one rank."""
    if config.scaling.world_size == 1:
        plain = {"engine.backend": "torch", "engine.zero_stage_g": 0, "engine.zero_stage_d": 0}
        yield from ({**plain, "engine.cuda_graphs": True}, {"engine.cuda_graphs": False})


def _engines(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """Both of them; DeepSpeed's without what it does not have."""
    yield {"engine.backend": "torch"}
    yield {"engine.backend": "deepspeed", "engine.cuda_graphs": False}


def _zero_stages(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """Partitioning saves memory only with more than one rank, and costs communication."""
    if machine.ranks(config) > 1:
        for stage_g, stage_d in ((1, 1), (2, 2), (3, 2), (0, 0)):
            yield {"engine.backend": "deepspeed", "engine.zero_stage_g": stage_g, "engine.zero_stage_d": stage_d}


WAIT_SHARE = 0.02
"""Share of the step that waits for data from which on a GPU's loader processes are worth a trial."""


def _loaders(config: TrainConfig, machine: Machine, best: Report) -> Iterator[Settings]:
    """On a GPU only if the steps wait for data. On a CPU the loaders take the ranks' time."""
    waits = best["time/data_s"] / sum(seconds for name, seconds in best.items() if name.startswith("time/"))
    if config.scaling.device == "gpu" and waits < WAIT_SHARE:
        return
    of_rank = machine.cpus // machine.ranks(config)
    numbers = (2, 4, 8, 16) if config.scaling.device == "gpu" else (0, 1, 2, 4)
    yield from ({"data.loader_workers": number} for number in numbers if number <= of_rank)


CANDIDATES = (
    Candidate(name="number format", values=_number_formats),
    Candidate(name="fused operators", values=_each("engine.fused", True, False), on_cpu=False),
    Candidate(name="compiled blocks", values=_each("engine.compile", True, False), on_cpu=False),
    Candidate(name="ranks and threads", values=_ranks_and_threads, on_gpu=False),
    Candidate(name="micro-batch", values=_micro_batches),
    Candidate(name="engine", values=_engines),
    Candidate(name="CUDA graphs", values=_cuda_graphs, on_cpu=False),
    Candidate(name="ZeRO stages", values=_zero_stages, on_cpu=False),
    Candidate(name="loader processes", values=_loaders),
)
"""The table of what is tried."""


def proposals(config: TrainConfig, machine: Machine, best: Report, candidate: Candidate) -> Iterator[Settings]:
    """The settings of one candidate that can be tried.

    Args:
        config: the best so far.
        machine: where.
        best: what was measured with `config`.
        candidate: the choice.
    """
    if not (candidate.on_gpu if config.scaling.device == "gpu" else candidate.on_cpu):
        return
    for settings in candidate.values(config, machine, best):
        if all(allowed(name, value) for name, value in settings.items()):
            yield settings
