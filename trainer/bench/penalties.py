"""How well finite differences estimate R1 at a trained discriminator: value and gradient, by length and precision.

The gradient with respect to D's parameters is what training takes from a penalty. One draw of the noise is what a step
sees; the mean over many draws shows the bias that no number of steps averages out.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.shards.index import load_index
from data.storage.errors import UserError
from models.diffusion import Diffusion
from models.networks.build import build_discriminator
from models.shapes import Image, Logits
from trainer.algorithm.methods import make_method
from trainer.algorithm.pairs import Labels, RawBatch
from trainer.algorithm.penalties import finite_difference_penalty, gradient_penalty
from trainer.algorithm.randomness import Draws
from trainer.checkpoint.format import Checkpoint, CheckpointError
from trainer.checkpoint.storage import find_checkpoint, storage_of_run
from trainer.checkpoint.whole import config_of, trained_discriminator
from trainer.config.train_config import TrainConfig
from trainer.rank.step.inputs import split_planes
from trainer.rank.step.share import Share, open_share

EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PenaltyError:
    """One length and precision."""

    precision: str
    epsilon: float
    value: float
    """Mean estimate divided by the exact penalty."""
    cosine_one: float
    """Cosine between the gradient of an estimate with one noise and that of the exact penalty, on average."""
    cosine_mean: float
    """The same for the mean of all estimates."""


def compare_penalties(
    run: Path, *, batch_size: int, num_noises: int, seed: int = 0
) -> tuple[float, list[PenaltyError]]:
    """Compare both at the real images of a run.

    Args:
        run: directory of an adversarial run with a checkpoint and its data set.
        batch_size: images, a multiple of the groups of the minibatch deviation.
        num_noises: draws of the noise for each length and precision.
        seed: seed of the draws.

    Returns:
        The exact penalty in float32, and the errors of the estimates.

    Raises:
        CheckpointError: there is no valid checkpoint, or it has no discriminator.
        DataError: the data set cannot be read.
        UserError: the batch size is no multiple of the groups.
    """
    checkpoint = find_checkpoint(storage_of_run(run), None)
    config = config_of(checkpoint)
    group_size = config.discriminator.stddev_group_size
    if batch_size % group_size:
        raise UserError(
            f"--batch-size is {batch_size}, but the minibatch deviation of this run compares groups of {group_size} "
            "images: give a multiple of it"
        )
    discriminator = _discriminator(checkpoint, config)
    parameters = list(discriminator.parameters())
    x_tm1, judge = _real_pair(config, discriminator, batch_size, seed)
    x = x_tm1.clone().requires_grad_()
    exact = gradient_penalty(judge(x), x)
    target = _flat_gradient(exact, parameters)
    generator, errors = torch.Generator().manual_seed(seed), []
    noises = [torch.randn(x_tm1.shape, generator=generator) for _ in range(num_noises)]
    for name, dtype in PRECISIONS.items():
        for epsilon in EPSILONS:
            values, cosines, total = 0.0, 0.0, torch.zeros_like(target)
            for noise in noises:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    estimate = finite_difference_penalty(judge, x_tm1, noise, epsilon)
                gradient = _flat_gradient(estimate, parameters)
                values, total = values + estimate.item(), total + gradient
                cosines += _cosine(gradient, target)
            errors.append(
                PenaltyError(
                    precision=name,
                    epsilon=epsilon,
                    value=values / num_noises / exact.item(),
                    cosine_one=cosines / num_noises,
                    cosine_mean=_cosine(total, target),
                )
            )
    return exact.item(), errors


def penalty_table(exact: float, errors: Iterable[PenaltyError]) -> str:
    """The errors as a table in Markdown."""
    return "\n".join(
        [
            f"exact R1 penalty in float32: {exact:.4g}",
            "",
            "| precision | epsilon | value / exact | cosine of the gradient, one noise | mean of all noises |",
            "|---|---|---|---|---|",
            *(
                f"| {e.precision} | {e.epsilon:g} | {e.value:.3f} | {e.cosine_one:.3f} | {e.cosine_mean:.3f} |"
                for e in errors
            ),
        ]
    )


def _discriminator(checkpoint: Checkpoint, config: TrainConfig) -> nn.Module:
    state = trained_discriminator(checkpoint)
    if state is None:
        raise CheckpointError(f"{checkpoint.path} is of objective {config.training.objective}: it has no discriminator")
    network = build_discriminator(config.discriminator, config.network_form)
    network.load_state_dict(state)
    return network


def _real_pair(
    config: TrainConfig, discriminator: nn.Module, batch_size: int, seed: int
) -> tuple[Image, Callable[[Image], Logits]]:
    """Real x_tm1, and D as a function of it."""
    group = config.discriminator.stddev_group_size
    share = Share(0, batch_size, batch_size, batch_size, 1, group)
    with closing(open_share(config, load_index(config.data.path), share, 0, pin=False)) as batches:
        batch = next(iter(batches))
    num_classes = config.data.num_classes
    labels = Labels(batch.labels, num_classes, 0.0) if num_classes else None
    draws = Draws(seed, 0, torch.arange(batch_size))
    images, conditions = split_planes(batch.images, config)
    raw = RawBatch(
        images,
        draws,
        config.generator.latent_dim,
        flip=False,
        share=1.0,
        labels=labels,
        domain=config.data.domain,
        conditions=conditions,
    )
    method = make_method(config.training, config.generator)
    pair = method.without_penalties().draw(raw, Diffusion.from_config(config.diffusion)).pair_d
    return pair.x_tm1, lambda x: discriminator(x, pair.x_t, pair.t, *pair.given)


def _flat_gradient(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()
