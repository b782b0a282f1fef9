"""The gradient penalties R1 (at real x_tm1) and R2 (at generated x_tm1): exact, or estimated by finite differences.

The exact penalty differentiates twice through the discriminator, uncompiled and in float32. The estimate needs only
further forward passes, on some of the images: it can be compiled, and it works with partitioned parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from models.layers import gradients_of_inputs
from models.shapes import Image, Logits
from trainer.algorithm.losses import Scalar, precise
from trainer.algorithm.randomness import Draws, Purpose

PenaltyKind = Literal["exact", "finite_difference"]
PenaltyName = Literal["r1", "r2"]
PURPOSES: dict[PenaltyName, Purpose] = {"r1": Purpose.D_PENALTY_REAL, "r2": Purpose.D_PENALTY_FAKE}


def gradient_penalty(logits: Logits, x_tm1: Image) -> Scalar:
    """Mean over the batch of ||grad_{x_tm1} D||_2^2, unweighted (Mescheder et al., 1801.04406, Eq. 9).

    On real x_tm1 this is R1, on generated x_tm1 it is R2.

    Args:
        logits: D(x_tm1, x_t, t), computed in float32 from an `x_tm1` that requires grad.
        x_tm1: the cleaner image of the pair.
    """
    with gradients_of_inputs():
        (gradient,) = torch.autograd.grad(logits.sum(), x_tm1, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def finite_difference_penalty(judge: Callable[[Image], Logits], x_tm1: Image, noise: Image, epsilon: float) -> Scalar:
    """Mean of (D(x_tm1 + epsilon n) - D(x_tm1))^2 / epsilon^2, an estimate of `gradient_penalty` (arXiv 2501.08316).

    Its expectation over n differs from the exact penalty by O(epsilon^2). Gradients flow through both forward passes.

    Args:
        judge: D as a function of x_tm1, in float32: bf16 rounds logits by more than they differ.
        x_tm1: the cleaner images, detached.
        noise: n, standard normal.
        epsilon: length of the difference for each unit of noise.
    """
    difference = precise(judge(x_tm1 + epsilon * noise)) - precise(judge(x_tm1))
    return (difference / epsilon).square().mean()


@dataclass(frozen=True)
class Subset:
    """Every n-th group of the global batch, as far as it lies in a micro-batch.

    Groups are those of the minibatch deviation, so that an image is compared with the same images in a subset as in the
    whole batch. Which groups are taken does not depend on the number of ranks or on the micro-batch size.

    Attributes:
        first: the first group of the micro-batch that is taken.
        every: n.
        group_size: images of a group.
        weight: factor of the mean over the subset, such that the weighted sum over all micro-batches is the mean over
            all taken groups of the global batch.
    """

    first: int
    every: int
    group_size: int
    weight: float

    @classmethod
    def of(cls, every: int, start: int, batch_size: int, group_size: int, global_batch_size: int) -> "Subset":
        """The subset of a micro-batch. One without any such group takes its first, with weight 0.

        Args:
            every: n.
            start: position of the micro-batch's first image in the global batch.
            batch_size: images of the micro-batch.
            group_size: images of a group.
            global_batch_size: images of the step.
        """
        groups, first = batch_size // group_size, -(start // group_size) % every
        if first >= groups:
            return cls(0, groups, group_size, 0.0)
        all_groups = global_batch_size // group_size
        here, everywhere = len(range(first, groups, every)) / groups, -(-all_groups // every) / all_groups
        return cls(first, every, group_size, here / everywhere)

    def __call__(self, x: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "b_taken ..."]:
        """The images of the subset."""
        return x.unflatten(0, (-1, self.group_size))[self.first :: self.every].flatten(0, 1)


@dataclass(frozen=True)
class PenaltyDraws:
    """What finite differences need of a micro-batch.

    Attributes:
        subset: chooses the images at which they are taken.
        noise: of each penalty, for the images of the subset.
    """

    subset: Subset
    noise: dict[PenaltyName, Image]

    @classmethod
    def of(cls, draws: Draws, shape: tuple[int, ...], subset: Subset, names: tuple[PenaltyName, ...]) -> "PenaltyDraws":
        """The noise of each penalty, by the draws of the whole micro-batch and the shape of an image."""
        taken = Draws(draws.seed, draws.step, subset(draws.samples))
        return cls(subset, {name: taken.normals(PURPOSES[name], shape) for name in names})
