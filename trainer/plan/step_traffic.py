"""The bytes and FLOPs of a whole training step of one rank: both updates, R1, optimizer and moving average.

It runs the code of `trainer.algorithm` on the meta device, as `trainer.plan.cost` does, with the casts of a GPU. What
runs as one kernel on a GPU is counted as one operation although the meta device does it in many: attention, the
compiled draw of a pair, and Adam. The engine is the plain torch engine of one rank, so that the sum of the gradients
over the ranks is not counted.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion
from models.fused.operator import fused
from trainer.algorithm.auxiliary import GradientScale
from trainer.algorithm.ema import Ema
from trainer.algorithm.method import Method, Part
from trainer.algorithm.methods import make_method
from trainer.config.train_config import TrainConfig, split_batch
from trainer.engine.frozen import learning
from trainer.engine.interface import Engine
from trainer.engine.plain import TorchEngine
from trainer.plan.bytes_moved import ByteCounter, Moved, Traffic, weighted
from trainer.plan.cuda_autocast import CudaAutocast
from trainer.plan.on_meta import (
    META,
    OneKernelAttention,
    PlayersOnMeta,
    given_on_meta,
    networks_on_meta,
    raw_batch_on_meta,
)
from trainer.plan.remembered import RememberedResults


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """What one step of the fullest rank does, by kind of operation."""

    update_d: Traffic
    """The discriminator's update without penalties, optimizer included; empty if there is no discriminator."""
    update_g: Traffic
    """The generator's update, optimizer and moving average included."""
    penalties: Traffic
    """What R1 and R2 add to an update of the discriminator. They save casts, so a kind may be negative."""
    penalty_interval_steps: int | None
    """Interval of the penalties; None: there are none."""
    generator: Traffic
    """Forward and backward of the generator alone, in one forward pass; update_g has them too."""

    @property
    def penalty_share(self) -> float:
        """The share of the steps that have penalties."""
        return 1 / self.penalty_interval_steps if self.penalty_interval_steps else 0.0

    @property
    def whole(self) -> Traffic:
        """A step on average, with the penalties at their interval."""
        return weighted((1, self.update_d), (1, self.update_g), (self.penalty_share, self.penalties))


def count_step(config: TrainConfig, *, bf16: bool, fuses: bool = False) -> StepTraffic:
    """Count what the fullest rank does in a step; takes seconds.

    Args:
        config: config of the run, except its precision.
        bf16: compute in bfloat16 as far as autocast on a GPU does, otherwise in float32.
        fuses: in channels_last with fused operators, otherwise in plain torch.
    """
    method = make_method(config.training, config.generator)
    how: _How = {"bf16": bf16, "fuses": fuses}
    update_d = _count_update(config, "d", method.without_penalties(), **how)
    penalized = _count_update(config, "d", method, **how) if method.penalties else {}
    return StepTraffic(
        update_d=update_d,
        update_g=_count_update(config, "g", method, **how),
        penalties=weighted((1, penalized), (-1, update_d)) if method.penalties else {},
        penalty_interval_steps=method.penalty_interval_steps if method.penalties else None,
        generator=count_generator(config, **how),
    )


class _How(TypedDict):
    bf16: bool
    fuses: bool


def _layout(fuses: bool) -> torch.memory_format:
    return torch.channels_last if fuses else torch.contiguous_format


def _fused(fuses: bool) -> AbstractContextManager:
    return fused("everywhere" if fuses else "nowhere")


def _count_update(config: TrainConfig, part: Part, method: Method[Any], *, bf16: bool, fuses: bool) -> Traffic:
    """One update of one network, with all forward passes of a step."""
    if part not in method.parts:
        return {}
    counter, diffusion, layout = ByteCounter(), Diffusion.from_config(config.diffusion, META), _layout(fuses)
    networks = networks_on_meta(config, method)
    for network in networks.values():
        network.to(META, memory_format=layout)  # pyright: ignore[reportCallIssue]
    engines: dict[Part, Engine] = {name: _Engine(network, counter) for name, network in networks.items()}
    average = Ema(engines["g"])
    raw = replace(raw_batch_on_meta(config), memory_format=layout)
    batch = method.draw(raw, diffusion)
    players = PlayersOnMeta(
        engines,
        diffusion,
        bf16=bf16,
        gradient_scale=GradientScale(META) if config.training.gradient_normalization else None,
        sees_x_t=config.discriminator.sees == "pair",
        memory_format=layout,
    )
    with _fused(fuses), RememberedResults(), OneKernelAttention(), counter:
        method.update(part, players, [batch], 0)
        if part == "g":
            with counter.all_as("average"):
                average.update(1, 0.5)
    # A batch has the draws of all updates; each is charged with the same share.
    counter.count("draw", read=raw.images.nbytes, written=_nbytes(_tensors(batch)) / len(method.parts))
    # The optimizer runs once a step. The rest is done in each forward pass, and the passes' gradients are added up.
    once: Traffic = {kind: counter.traffic.pop(kind) for kind in ("optimizer", "average")}
    passes, parameters = split_batch(config).grad_accum_steps, learning(engines[part].module)
    size = _nbytes(parameters)
    sums: Traffic = {"elementwise": Moved(2 * size, size, len(parameters))}
    return weighted((1, once), (passes, counter.traffic), (passes - 1, sums))


def count_generator(config: TrainConfig, *, bf16: bool, fuses: bool = False) -> Traffic:
    """Forward and backward of the generator alone, for one micro-batch.

    Args:
        config: config of the run, except its precision.
        bf16: compute in bfloat16 as far as autocast on a GPU does, otherwise in float32.
        fuses: in channels_last with fused operators, otherwise in plain torch.
    """
    method = make_method(config.training, config.generator)
    generator, batch_size = networks_on_meta(config, method)["g"], split_batch(config).micro_batch_size
    layout = _layout(fuses)
    generator.to(META, memory_format=layout)  # pyright: ignore[reportCallIssue]
    x_t = torch.empty((batch_size, *config.network_form.shape), device=META, memory_format=layout)
    t = torch.zeros(batch_size, dtype=torch.int64, device=META)
    z, gradient = torch.empty(batch_size, config.generator.latent_dim, device=META), torch.empty_like(x_t)
    with _fused(fuses), RememberedResults(), OneKernelAttention(), ByteCounter() as counter:
        with CudaAutocast() if bf16 else nullcontext():
            x0_pred = generator(x_t, t, z, *given_on_meta(config, batch_size))
        x0_pred.backward(gradient.to(x0_pred.dtype))
    return counter.traffic


class _Engine(TorchEngine):
    """The plain torch engine, whose optimizer is counted as one pass over the parameters."""

    def __init__(self, module: nn.Module, counter: ByteCounter) -> None:
        super().__init__(module, _CountedAdam(module, counter), grad_accum_steps=1, max_gradient_norm=None)
        self._counter = counter

    def step(self, *, wait: bool = True) -> None:
        with self._counter.all_as("optimizer"):
            super().step(wait=wait)


class _CountedAdam(torch.optim.Optimizer):
    """Fused Adam, counted only: reads parameters, gradients and both moments, and writes all but the gradients."""

    def __init__(self, module: nn.Module, counter: ByteCounter) -> None:
        parameters = learning(module)
        super().__init__(parameters, {"fused": True})
        self._counter, self._bytes = counter, _nbytes(parameters)

    def step(self, closure: Any = None) -> Any:
        self._counter.count("optimizer", read=4 * self._bytes, written=3 * self._bytes)


def _nbytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a method's batch, at any depth."""
    if isinstance(batch, Tensor):
        yield batch
    elif is_dataclass(batch):
        for part in vars(batch).values():
            yield from _tensors(part)
