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
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.engine.guard import UpdateGuard


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam, for the generator and the discriminator alike."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Term added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs backward, reduction and update."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain twin without ZeRO: slower to scale, easy to debug."""
    zero_stage_g: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the generator: 0 replicates, 1 partitions optimizer states, 2 gradients too, 3 parameters too."""
    zero_stage_d: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the discriminator, at most 2: R1 differentiates twice through it."""
    compile: bool = False
    """On a GPU, compile both networks: the first two steps take minutes longer. R1 and R2 are taken without it. No
    effect on a CPU, with run.deterministic, with dropout, or on a network at ZeRO stage 3. docs/benchmarks.md says what
    of it has been measured."""

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


class FragmentSource(Protocol):
    """Where saved state is read from, by ranges of flattened parameters."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `state` ("parameter", "exp_avg", "exp_avg_sq") of parameter `name`, on the CPU."""
        ...


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
