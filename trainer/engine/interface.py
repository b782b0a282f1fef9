"""What runs backward, gradient reduction and the optimizer: a DeepSpeed engine, and a plain torch twin of it.

Both show the same small face, so the step reads the same over either. How to use them, and why (each of these was
measured: the other ways are silently wrong at some ZeRO stage):

* every forward goes through `engine.module`, never through the engine;
* one summed loss and one `backward` per micro-batch, R1 inside that loss;
* while the generator learns, the discriminator's parameters do not require grad;
* gradient clipping is set to 0, because DeepSpeed clips at 1.0 when it is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.engine.guard import UpdateGuard

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Factor that a moving average keeps of its value at each update."""


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The Adam optimizer of both networks."""

    beta1: Decay = 0.5
    """Decay of the first moment, the moving average of the gradient."""
    beta2: Decay = 0.9
    """Decay of the second moment, the moving average of the squared gradient."""
    eps: PositiveFloat = 1e-8
    """Term added to the square root of the second moment, so that nothing is divided by 0."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What computes gradients, averages them over the ranks and updates the weights."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` does the same in plain torch, without ZeRO: easier to debug, and every rank holds all of the state."""
    zero_stage_g: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the generator, which says what is partitioned over the ranks to save memory: 0 nothing, 1 the
    optimizer's state, 2 also the gradients, 3 also the parameters."""
    zero_stage_d: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the discriminator, as for the generator, but at most 2: R1 differentiates twice through it."""
    compile: bool = False
    """Compile both networks with torch.compile on a GPU. The first two steps then take minutes longer. The penalties R1
    and R2 are computed without it. It has no effect on a CPU, with run.deterministic, with dropout, or on a network at
    ZeRO stage 3. docs/benchmarks.md has measurements."""

    def __post_init__(self) -> None:
        if self.zero_stage_d == 3:
            raise ValueError(
                "zero_stage_d is 3, at most 2 is possible: R1 differentiates twice through the discriminator's "
                "convolutions, which DeepSpeed cannot do on partitioned parameters. Set zero_stage_d to 0, 1 or 2"
            )
        if self.backend == "torch" and (self.zero_stage_g or self.zero_stage_d):
            raise ValueError(
                f"backend torch has no ZeRO, zero_stage_g is {self.zero_stage_g} and zero_stage_d "
                f"{self.zero_stage_d}: set both to 0 or the backend to deepspeed"
            )


@dataclass(frozen=True)
class Fragment:
    """The contiguous piece of one flattened parameter that a rank owns, with its optimizer state.

    The fragments of all ranks tile every parameter exactly once at every ZeRO stage, so together they are the state of
    the engine, whatever the number of ranks that wrote them.

    Attributes:
        name: of the parameter in the module.
        start: offset of the piece in the flattened parameter.
        tensors: "parameter", "exp_avg" and "exp_avg_sq", each flat and of the piece's length.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


@runtime_checkable
class FragmentSource(Protocol):
    """Where saved state is read from, by ranges of flattened parameters."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `state` ("parameter", "exp_avg", "exp_avg_sq") of parameter `name`, on the CPU."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A network with its optimizer."""

    module: nn.Module
    guard: UpdateGuard
    partitioned: bool
    """Whether a rank holds its own partitions of the parameters alone, as at ZeRO stage 3."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`; on the last micro-batch of the step it is averaged over the ranks."""
        ...

    def step(self) -> None:
        """Called after each `backward`; updates the parameters after the last micro-batch of the step.

        The update is skipped, on all ranks alike, if the guard says so.
        """
        ...

    def num_updates(self) -> int:
        """Updates that the optimizer has made, which skipped ones do not count among. Waits for the device."""
        ...

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate of the next update."""
        ...

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        """Name, offset and memory of what this rank holds: whole parameters, or its own partitions at stage 3."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each whole parameter by name."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """The pieces this rank owns."""
        ...

    def load(self, source: FragmentSource, num_updates: int) -> None:
        """Take parameters and optimizer state from `source`; `num_updates` were made before."""
        ...

    def close(self) -> None:
        """Release what the engine registered with the process."""
        ...


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The [start, stop) that `rank` owns of `numel` elements that all ranks hold."""
    return numel * rank // world_size, numel * (rank + 1) // world_size
