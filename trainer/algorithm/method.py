"""The interface of a training method: which networks it trains, what it draws for a batch, and how it updates them.

A method holds settings and no state. It gets the networks, in their engines, as `Players`, and asks them by the
functions at the end of this file. Each method has its own file, and `methods.py` finds it by the name in the config.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from models.diffusion import Diffusion, Sampler, sample_posterior
from models.dropout import masks_from
from models.noise_levels import NoiseConfig
from models.shapes import Image, Latent, Logits, Predictions, Timestep
from trainer.algorithm.augmentation import AdaptiveProbability, AugmentationConfig
from trainer.algorithm.auxiliary import GradientScale, ReconstructionConfig
from trainer.algorithm.losses import UnbalancedTransportConfig
from trainer.algorithm.pairs import Pair, RawBatch, given, laid_out
from trainer.algorithm.schedules import Weight
from trainer.algorithm.statistics import Statistic, Statistics
from trainer.engine.interface import Engine

Part = Literal["d", "g"]
"""A trained network: the discriminator or the generator."""
PART_NAMES: dict[Part, str] = {"d": "discriminator", "g": "generator"}
Prediction = Literal["x0", "epsilon"]
"""What a generator's output is: the clean image, or the noise in x_t."""
BatchT = TypeVar("BatchT")


Context = tuple[Tensor | None, ...]
"""What D judges x_tm1 with, in the order of its arguments; see `context_of`."""


@runtime_checkable
class RunningState(Protocol):
    """Small tensors that a game carries from step to step next to the networks, the same on all ranks."""

    def end_step(self, steps: int) -> None:
        """Take in a step of all ranks, a collective; `steps` of the stage are done."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, between steps."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's state, or start from an empty one; ValueError if it is another's."""
        ...


@dataclass(frozen=True)
class Players:
    """The networks of a step in their engines, and what every update needs.

    Attributes:
        engines: the engine of each part.
        diffusion: tables of the forward process and its posterior, on the device.
        world_size: number of ranks over which the engines average gradients.
        bf16: compute in bfloat16, except R1, R2 and the losses.
        compiled: compiled forward passes of the engines' modules, for the parts that have one.
        memory_format: layout of images, features and 4-D weights in every pass.
        augmentation: the probability of a transform, if it follows D.
        gradient_scale: normalizes the gradient that G gets from the game; None: it is taken as it is.
        sees_x_t: whether D sees x_t, and not x_tm1 alone.
    """

    engines: Mapping[Part, Engine]
    diffusion: Diffusion
    world_size: int = 1
    bf16: bool = False
    compiled: Mapping[Part, Callable[..., Tensor]] = field(default_factory=dict)
    memory_format: torch.memory_format = torch.contiguous_format
    augmentation: AdaptiveProbability | None = None
    gradient_scale: GradientScale | None = None
    sees_x_t: bool = True

    @property
    def running(self) -> dict[str, RunningState]:
        """The running states that there are, by their names in checkpoints."""
        states = {"augmentation": self.augmentation, "gradient_scale": self.gradient_scale}
        return {name: state for name, state in states.items() if state}

    @property
    def generator(self) -> Engine:
        """The generator's engine."""
        return self.engines["g"]

    @property
    def discriminator(self) -> Engine:
        """The discriminator's engine, if the method trains a discriminator."""
        return self.engines["d"]

    def forward(self, part: Part) -> Callable[..., Tensor]:
        """A network's forward pass, compiled if possible. Do not use it where a second derivative is needed."""
        return self.compiled.get(part) or self.engines[part].module

    def autocast(self, x_t: Image) -> AbstractContextManager:
        """Autocast context of the forward pass. Forward passes bypass the engines, so they cannot open it."""
        return torch.autocast(x_t.device.type, torch.bfloat16) if self.bf16 else nullcontext()


@runtime_checkable
class MethodSettings(Protocol):
    """The settings that methods read: the training section of a config, which documents each value."""

    @property
    def objective(self) -> str: ...  # noqa: D102
    @property
    def prediction(self) -> Prediction: ...  # noqa: D102
    @property
    def r1_gamma(self) -> Weight: ...  # noqa: D102
    @property
    def r2_gamma(self) -> Weight: ...  # noqa: D102
    @property
    def r1_interval_steps(self) -> int | None: ...  # noqa: D102
    @property
    def noise(self) -> NoiseConfig: ...  # noqa: D102
    @property
    def penalty(self) -> Literal["exact", "finite_difference"]: ...  # noqa: D102
    @property
    def penalty_share(self) -> float: ...  # noqa: D102
    @property
    def penalty_epsilon(self) -> float: ...  # noqa: D102
    @property
    def logit_centring(self) -> float: ...  # noqa: D102
    @property
    def reconstruction(self) -> ReconstructionConfig: ...  # noqa: D102
    @property
    def transport(self) -> Weight: ...  # noqa: D102
    @property
    def afd(self) -> Weight: ...  # noqa: D102
    @property
    def denoising(self) -> Weight: ...  # noqa: D102
    @property
    def gradient_normalization(self) -> bool: ...  # noqa: D102
    @property
    def unbalanced_transport(self) -> UnbalancedTransportConfig: ...  # noqa: D102
    @property
    def augmentation(self) -> AugmentationConfig: ...  # noqa: D102
    @property
    def global_batch_size(self) -> int: ...  # noqa: D102


@runtime_checkable
class Method(Protocol[BatchT]):
    """A training method; `BatchT` is its form of a micro-batch."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The networks it trains, in the order of their updates within a step."""
        ...

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that its updates return."""
        ...

    @property
    def penalties(self) -> tuple[str, ...]:
        """Names of the penalties whose weight is not zero, such as r1."""
        ...

    @property
    def penalty_interval_steps(self) -> int:
        """The interval n: penalties are added in steps 0, n, 2n, ..."""
        ...

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """Samplers that work with the trained generator."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What the generator's output is: the clean image, or the noise in x_t."""
        ...

    @property
    def uses_latent(self) -> bool:
        """Whether the generator gets a random z, in training and sampling; otherwise it gets zeros."""
        ...

    def without_penalties(self) -> "Method[BatchT]":
        """The same method without penalties."""
        ...

    def starting_at(self, step: int) -> "Method[BatchT]":
        """The same method for a stage of a run that begins with `step`: from there its courses count images."""
        ...

    def at(self, step: int, part: Part | None = None) -> "Method[BatchT]":
        """The same method with the numbers of one step, from 0, in place of those that have a course.

        Where the methods of two steps are equal, their updates are the same function of images, draws, networks and
        states, which are all tensors.

        Args:
            step: of the run, from 0.
            part: whose update it is for: numbers that this one does not use are left out. None: for all.
        """
        ...

    def draw(self, raw: RawBatch, diffusion: Diffusion) -> BatchT:
        """What the updates of a step see of a micro-batch: a pure function of images and (seed, step, sample).

        Args:
            raw: the images.
            diffusion: tables on their device.
        """
        ...

    def update(self, part: Part, players: Players, batches: Sequence[BatchT], step: int = 0) -> Statistics:
        """One update of one network.

        Args:
            part: which network.
            players: the networks.
            batches: as many micro-batches as the engines accumulate.
            step: counts from 0; decides whether penalties are due. A method `at` a step is the same for each.
        """
        ...

    def x0_predictor(
        self, generator: Callable[[Image, Timestep, Latent], Image], diffusion: Diffusion
    ) -> Callable[[Image, Timestep, Latent], Image]:
        """The trained generator as a map from (x_t, t, z) to x0_pred, for sampling."""
        ...


def generated(players: Players, pair: Pair) -> tuple[Image, Image]:
    """G's x0_pred for a pair, and the fake x_tm1: a sample of q(x_tm1 | x_t, x0_pred)."""
    with players.autocast(pair.x_t), masks_from(players.generator.module, pair.dropout):
        x0_pred = players.forward("g")(pair.x_t, pair.t, pair.z, *pair.given).to(pair.x_t.dtype)
        return x0_pred, sample_posterior(players.diffusion, x0_pred, pair.x_t, pair.t, pair.noise_posterior)


def context_of(players: Players, pair: Pair) -> Context:
    """What D judges x_tm1 with: x_t, t, the label and, if there is one, the condition; images as far as D sees them."""
    # A D that sees x_tm1 alone takes no more than its size from x_t.
    x_t = seen(players, pair, pair.x_t) if players.sees_x_t else pair.x_t
    condition = None if pair.condition is None else seen(players, pair, pair.condition)
    return (x_t, pair.t, *given(pair.label, condition))


def judged(
    players: Players, pair: Pair, x_tm1: Image, context: Context, *, penalized: bool, predicting: bool = False
) -> tuple[Image, Logits, Predictions | None]:
    """D's logits for one side of a pair, real or fake, as far as the pair's view shows it.

    Penalties are those at x_tm1, before the view, as in ADA (2006.06676) and R3GAN (2501.05441): the slope along pixels
    that D does not see is 0.

    Args:
        players: the networks.
        pair: gives the view.
        x_tm1: the cleaner image, detached.
        context: from `context_of`.
        penalized: the logits will be differentiated with respect to x_tm1. D then runs uncompiled and in float32: bf16
            causes errors of several per cent in a penalty, and compiled code has no second derivative.
        predicting: D predicts as well.

    Returns:
        x_tm1, which requires grad if `penalized`, the logits, and D's predictions if it makes some.
    """
    x_tm1 = x_tm1.requires_grad_(penalized)
    D = players.discriminator.module if penalized else players.forward("d")
    with nullcontext() if penalized else players.autocast(pair.x_t):
        return x_tm1, *answer(D, seen(players, pair, x_tm1), context, predicting=predicting)


def answer(
    D: Callable[..., Any], x_tm1: Image, context: Context, *, predicting: bool
) -> tuple[Logits, Predictions | None]:
    """D's logits for x_tm1 as it sees it, and its predictions if they are asked for."""
    return D(x_tm1, *context, predicting=True) if predicting else (D(x_tm1, *context), None)


def seen(players: Players, pair: Pair, x: Image) -> Image:
    """Images of a pair as D sees them: x itself without augmentation."""
    return x if pair.view is None else laid_out(pair.view(x), players.memory_format)
