"""The interface of an engine, which runs backward, gradient reduction and the optimizer: DeepSpeed or plain torch.

Both engines have this interface, so the code of a step does not depend on the choice. Rules for using them
(breaking any of them was measured to be silently wrong at some ZeRO stage):

* every forward pass goes through `engine.module`, never through the engine;
* one summed loss and one `backward` per micro-batch, with R1 inside that loss;
* while the generator is updated, the discriminator's parameters do not require grad;
* gradient clipping is set to 0, because DeepSpeed clips at 1.0 by default.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.engine.guard import UpdateGuard

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Factor that a moving average keeps of its value at each update."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine that runs backward, gradient reduction and update."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain torch engine without ZeRO: it scales worse but is easy to debug."""
    zero_stage_g: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the generator, which says what is partitioned over the ranks to save memory: 0 nothing, 1 the
    optimizer's state, 2 also the gradients, 3 also the parameters."""
    zero_stage_d: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the discriminator, as for the generator. Exact penalties R1 and R2 allow at most 2, because they
    differentiate twice through it; training.penalty finite_difference allows 3."""
    fused: bool = True
    """Use fused kernels on a GPU for norms with activation, residual sums, FIR filters and the discriminator's
    activations. They need Triton, which torch's builds for GPUs bring, and are checked against plain torch when a shape
    comes for the first time. They are deterministic, and serve at every ZeRO stage and for the penalties R1 and R2. It
    has no effect on a CPU."""
    checkpoint_activations: bool = False
    """Keep only the inputs of each residual block for the backward pass, which computes the blocks again: a fraction of
    the memory for activations, and about a third more arithmetic. The results are the same. Not at ZeRO stage 3, and
    without engine.compile, which has then no effect."""
    compile: bool = False
    """Compile the blocks of both networks with torch.compile on a GPU, each kind of block once. The first step then
    takes longer. The penalties R1 and R2 are computed without it. It has no effect on a CPU, with run.deterministic,
    with dropout, or on a network at ZeRO stage 3. docs/benchmarks.md has measurements."""
    cuda_graphs: bool = False
    """Record the whole update of D and of G as a CUDA graph on a GPU once it repeats, and replay it with one launch, so
    that the host does not limit small networks. Only with backend torch; it has no effect on a CPU or with several
    ranks. D's update is made as without in steps with R1 or R2, and so are updates while a weight of a loss, the
    probability of augmentation or training.adam.beta2 is on its course. It holds the activations of both updates at
    once, and rounds the learning rate to float32. Not measured: see docs/benchmarks.md."""
    compile_cache: str | None = None
    """Folder in which compiled code is kept for later starts, by versions and GPU; only this user may be able to write
    to it. null: `ddgan/compiled` in the user's cache folder ($XDG_CACHE_HOME, by default ~/.cache)."""

    def __post_init__(self) -> None:
        if self.backend == "torch" and (self.zero_stage_g or self.zero_stage_d):
            raise ValueError(
                f"backend torch has no ZeRO, but zero_stage_g is {self.zero_stage_g} and zero_stage_d is "
                f"{self.zero_stage_d}: set both to 0, or set the backend to deepspeed"
            )
        if self.backend == "deepspeed" and self.cuda_graphs:
            raise ValueError(
                "cuda_graphs is true, but backend deepspeed decides on the host what each update does, which a graph "
                "does not repeat: set the backend to torch, or cuda_graphs to false"
            )
        if self.checkpoint_activations and 3 in (self.zero_stage_g, self.zero_stage_d):
            raise ValueError(
                "checkpoint_activations is true, but at ZeRO stage 3 a block's parameters are gone when it is computed "
                "again: set zero_stage_g and zero_stage_d to at most 2, or checkpoint_activations to false"
            )


@dataclass(frozen=True)
class Fragment:
    """The contiguous piece of one flattened parameter that a rank owns, with its optimizer state.

    At every ZeRO stage the fragments of all ranks cover each parameter exactly once. Together they are the engine's
    whole state, independent of the number of ranks that wrote them.

    Attributes:
        name: name of the parameter in the module.
        start: offset of the piece in the flattened parameter.
        tensors: "parameter", and "exp_avg" and "exp_avg_sq" unless it is frozen; each flat and as long as the
            piece.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


@runtime_checkable
class FragmentSource(Protocol):
    """Reads saved state by ranges of flattened parameters."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `state` ("parameter", "exp_avg", "exp_avg_sq") of parameter `name`, on the CPU."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A network with its optimizer."""

    module: nn.Module
    guard: UpdateGuard
    partitioned: bool
    """Whether a rank holds only its own partitions of the parameters, as at ZeRO stage 3."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`; on the last micro-batch of the step it is averaged over the ranks."""
        ...

    def step(self, *, wait: bool = True) -> None:
        """Call it after each `backward`; it updates the parameters after the last micro-batch of the step.

        If the guard judges the update bad, all ranks skip it.

        Args:
            wait: false: the update may be put off until `finish`, so that other work hides the gradients' reduction.
        """
        ...

    def finish(self) -> None:
        """Make the update that `step` put off, if there is one. Call it before the parameters or the guard are used."""
        ...

    def num_updates(self) -> int:
        """Number of updates that the optimizer has made, not counting skipped ones. Waits for the device."""
        ...

    def set_rates(self, learning_rate: float, beta2: float | None = None) -> None:
        """Set the learning rate of the next update, and Adam's decay of the second moment unless it is None."""
        ...

    def numbers(self) -> object:
        """The host's numbers in the next update, but for the learning rate: equal for updates of the same kernels."""
        ...

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        """(name, offset, tensor) of what this rank holds: whole parameters, or its own partitions at stage 3."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each whole parameter by name."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """The pieces this rank owns."""
        ...

    def load(self, source: FragmentSource, num_updates: int) -> None:
        """Load parameters and optimizer state from `source`, and set the update count to `num_updates`."""
        ...

    def close(self) -> None:
        """Release the engine's process-wide resources."""
        ...


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The range [start, stop) that `rank` saves of `numel` elements that all ranks hold."""
    return numel * rank // world_size, numel * (rank + 1) // world_size
