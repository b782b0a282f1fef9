"""Draws images from a run: image i is a function of the weights, the seed and i."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int64
from rich.progress import track
from torch import Tensor, nn

from data.storage.errors import UserError
from data.storage.paths import path_argument
from models.diffusion import Diffusion, Sampler, sample
from models.shapes import Condition, Label, Uint8Image
from models.wavelets import from_pixels, to_pixels
from trainer.algorithm.methods import make_method
from trainer.algorithm.pairs import given
from trainer.algorithm.randomness import Draws, Purpose
from trainer.checkpoint.format import Checkpoint, CheckpointError
from trainer.checkpoint.retention import Choice, checkpoint_argument, choose_checkpoint
from trainer.checkpoint.snapshot import build_generator, is_snapshot, load_snapshot
from trainer.checkpoint.storage import CheckpointStorage, fetch_for_ranks, forget_for_ranks, storage_of_run
from trainer.checkpoint.whole import Weights, trained_generator
from trainer.config.train_config import TrainConfig
from trainer.engine.compiled import CompiledForward, can_compile
from trainer.engine.ranks import Ranks
from trainer.sample.images import to_uint8

PIXELS_AT_ONCE = 2**18
MAX_IMAGES_AT_ONCE = 64
FAST_FACTOR = 8
"""With `fast`, batches are larger by this factor."""
MAX_GUIDANCE = 100.0
"""Beyond it every pixel is black or white."""
Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x0_pred of (x_t, t, z)."""
Conditions = Callable[[Sequence[int]], Uint8Image]
"""What is given with the images of some numbers, uint8 [B, K, H, W]; numbers beyond the last one begin anew."""

Loaded = tuple[nn.Module, Diffusion, TrainConfig]
"""A generator in evaluation mode, its tables on the same device, and its config."""


NEEDS_CONDITIONS = (
    "this run translates images, and needs some to translate: python -m trainer.translate --run RUN --input FOLDER "
    "--out FOLDER"
)


def to_condition(images: Uint8Image, config: TrainConfig, device: torch.device | str) -> Condition:
    """What is given with images, on a device, as the networks see it."""
    return from_pixels(images.to(device).to(torch.float32) / 127.5 - 1.0, config.data.domain)


def images_at_once(image_size: int, *, fast: bool = False) -> int:
    """Images per forward pass: 64 up to 64 px, 4 at 256 px, with `fast` 8 times as many. It affects the samples."""
    return max(1, min(MAX_IMAGES_AT_ONCE, PIXELS_AT_ONCE // image_size**2)) * (FAST_FACTOR if fast else 1)


def sample_batches(
    generator: nn.Module,
    diffusion: Diffusion,
    config: TrainConfig,
    *,
    num: int,
    seed: int,
    sampler: Sampler = "ancestral",
    classes: Sequence[int] | None = None,
    guidance: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    fast: bool = False,
    seeds: Sequence[int] | None = None,
    conditions: Conditions | None = None,
) -> Iterator[Uint8Image]:
    """Images 0 .. num-1 of `seed`, a batch at a time, on the CPU.

    Args:
        generator: the generator in eval mode, on the device where the images are drawn.
        diffusion: tables on the same device.
        config: the run's config.
        num: number of images.
        seed: seed of all noise.
        sampler: how x_tm1 is computed from x0_pred.
        classes: what to draw from a model with classes, in turn: image i is of `classes[i % len(classes)]`. None: all.
        guidance: how far x0_pred moves from that without a class to that of the class, and beyond it above 1
            (classifier-free guidance, 2207.12598); 1 needs no second forward pass. Above 1, samples are more typical
            of their class and less varied.
        rank, world_size: only batches rank, rank + world_size, ... of those that one process would draw.
        fast: in bfloat16, compiled, and with more images at once; they come out a little different. On a GPU only.
        seeds: of each image, in place of `seed`: the first image of each of these `num` seeds.
        conditions: what is given with each image; only and always with a model that translates.

    Raises:
        UserError: a sampler that the run's objective does not know, classes that the model does not have, guidance of a
            model that cannot draw without a class or condition, or a model that needs conditions and got none.
    """
    training = config.training
    if (conditions is None) != (not config.data.condition_channels):
        raise UserError(NEEDS_CONDITIONS if conditions is None else "this run was trained without conditions")
    in_turn = torch.tensor(_checked_classes(classes, config.data.num_classes))
    method = make_method(training, config.generator)
    if sampler not in method.samplers:
        raise UserError(
            f"sampler {sampler} does not fit this run, whose training.objective is {training.objective}: its generator "
            f"works only with {', '.join(method.samplers)}"
        )
    batch = images_at_once(config.data.image_size, fast=fast)
    check_guidance(guidance, config)
    device = next(generator.parameters()).device
    forward = _fast_forward(generator) if fast else generator
    for first in range(rank * batch, num, world_size * batch):
        samples = torch.arange(first, first + batch, device=device)
        label = in_turn.to(device)[samples % len(in_turn)] if len(in_turn) else None
        condition = None if conditions is None else to_condition(conditions(samples.tolist()), config, device)
        of_images: int | Tensor = seed
        if seeds is not None:
            of_images, samples = torch.tensor(seeds, device=device)[samples % num], torch.zeros_like(samples)
        images = draw_batch(
            forward, diffusion, config, of_images, samples, label, condition, sampler=sampler, guidance=guidance
        )
        yield images[: num - first].cpu()


def draw_batch(
    generator: Callable[..., Tensor],
    diffusion: Diffusion,
    config: TrainConfig,
    seed: int | Tensor,
    samples: Int64[Tensor, " b"],
    label: Label | None,
    condition: Condition | None = None,
    *,
    sampler: Sampler = "ancestral",
    guidance: float = 1.0,
) -> Uint8Image:
    """Images of a seed, each a function of the seed and its number; torch can export this.

    Args:
        generator: maps (x_t, t, z), and with classes `label`, with conditions `condition`, to the network's output.
        diffusion: tables on the device of `samples`.
        config: the run's config.
        seed: in [0, 2**63); an int, or int64 [], or one for each image, int64 [B].
        samples: numbers of the images.
        label: their classes; None for a model without classes.
        condition: what is given with them, in the run's domain; None for a model without conditions.
        sampler: one that the run's objective knows.
        guidance: as in `sample_batches`.
    """
    method, shape = make_method(config.training, config.generator), config.network_form.shape

    def predictor_of(label: Label | None, condition: Condition | None) -> Predictor:
        present = {k: v for k, v in (("label", label), ("condition", condition)) if v is not None}
        return method.x0_predictor(partial(generator, **present) if present else generator, diffusion)

    def draw(t: int) -> tuple[Tensor, Tensor]:
        draws = Draws(seed, t, samples)
        z = draws.normals(Purpose.SAMPLE_LATENT, (config.generator.latent_dim,))
        return z, draws.normals(Purpose.SAMPLE_NOISE_POSTERIOR, shape)

    predictor = predictor_of(label, condition)
    if guidance != 1:
        training, no_label, no_condition = config.training, label, condition
        if label is not None and training.label_dropout:
            no_label = torch.full_like(label, config.data.num_classes)
        if condition is not None and training.condition_dropout:
            no_condition = torch.zeros_like(condition)
        predictor = _guided(predictor, predictor_of(no_label, no_condition), guidance)
    noise_T = Draws(seed, diffusion.num_timesteps, samples).normals(Purpose.SAMPLE_NOISE_T, shape)
    x0 = sample(predictor, diffusion, noise_T=noise_T, draw=draw, sampler=sampler)
    return to_uint8(to_pixels(x0, config.data.domain))


def _guided(of_class: Predictor, of_none: Predictor, guidance: float) -> Predictor:
    """The prediction beyond that of the class, clipped to the range of images."""

    def predict(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return torch.lerp(of_none(x_t, t, z), of_class(x_t, t, z), guidance).clamp(-1.0, 1.0)

    return predict


def check_guidance(guidance: float, config: TrainConfig) -> None:
    """Raise UserError if a run cannot draw with a guidance."""
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise UserError(f"guidance is {guidance:g}; allowed: 0 to {MAX_GUIDANCE:g}, where 1 is none")
    if guidance == 1:
        return
    training, data = config.training, config.data
    if data.condition_channels:
        if not training.condition_dropout and not training.label_dropout:
            raise UserError(
                "guidance is given, but this run never saw an image without its condition: training.condition_dropout "
                "is 0. Train with it, such as 0.1, or leave guidance out"
            )
        return
    if not data.num_classes:
        raise UserError("guidance is given, but this run was trained without classes: data.num_classes is 0")
    if not training.label_dropout:
        raise UserError(
            "guidance is given, but this run never saw an image without its label: training.label_dropout is 0. Train "
            "with training.label_dropout, such as 0.1, or leave guidance out"
        )


def _fast_forward(generator: nn.Module) -> Callable[..., Tensor]:
    """The generator in bfloat16, compiled if possible."""
    device = next(generator.parameters()).device
    if device.type != "cuda":
        raise UserError(f"fast sampling needs a GPU, but the generator is on the device {device}")
    forward = CompiledForward(generator) if can_compile(generator) else generator

    def run(x_t: Tensor, t: Tensor, z: Tensor, label: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return forward(x_t, t, z, *given(label, condition)).float()

    return run


def _checked_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    if classes is None:
        return list(range(num_classes))
    if not num_classes:
        raise UserError("classes are given, but this run was trained without classes: data.num_classes is 0")
    wrong = [label for label in classes if not 0 <= label < num_classes]
    if wrong or not classes:
        raise UserError(f"classes are {', '.join(map(str, classes)) or 'none'}; allowed: 0 to {num_classes - 1}")
    return list(classes)


def sample_images(
    generator: nn.Module,
    diffusion: Diffusion,
    config: TrainConfig,
    *,
    num: int,
    seed: int,
    sampler: Sampler = "ancestral",
    classes: Sequence[int] | None = None,
    guidance: float = 1.0,
    fast: bool = False,
    seeds: Sequence[int] | None = None,
    conditions: Conditions | None = None,
    shows_progress: bool = False,
) -> Uint8Image:
    """All images of `sample_batches`, uint8 [num, C, H, W]; can show progress on a terminal."""
    batches = sample_batches(
        generator,
        diffusion,
        config,
        num=num,
        seed=seed,
        sampler=sampler,
        classes=classes,
        guidance=guidance,
        fast=fast,
        seeds=seeds,
        conditions=conditions,
    )
    return torch.cat(list(with_progress(batches, num, config, fast=fast) if shows_progress else batches))


def with_progress(
    batches: Iterator[Uint8Image], num: int, config: TrainConfig, *, fast: bool = False
) -> Iterable[Uint8Image]:
    """The batches of `sample_batches` for `num` images, with a progress bar if stderr is a terminal."""
    total = -(-num // images_at_once(config.data.image_size, fast=fast))
    return track(batches, "sampling", total=total, disable=not sys.stderr.isatty())


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --run, and --checkpoint, a `Choice` or None."""
    parser.add_argument(
        "--run", type=path_argument, required=True, help="directory of the run, of a snapshot, or of an exported model"
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_argument,
        metavar="STEP",
        help="step of a checkpoint, latest, or best, which is the best by checkpoint.keep_best (default: latest)",
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add --weights."""
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="average",
        help="the moving average of the generator's weights (default), or the live ones",
    )


def load_run(
    run: Path, choice: Choice | None = None, device: torch.device | str = "cpu", weights: Weights = "average"
) -> Loaded:
    """The generator of a checkpoint.

    Args:
        run: the run's directory, or a folder with a snapshot, such as `trainer.export` writes.
        choice: which checkpoint; None: the newest valid one, or the snapshot.
        device: where to put the generator.
        weights: the average, or the live weights.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged; the message lists those that exist.
        UserError: a snapshot has neither checkpoints nor live weights.
    """
    if not is_snapshot(run):
        return load_checkpoint(storage_of_run(run), "latest" if choice is None else choice, device, weights)[0]
    if choice is not None:
        raise UserError(f"{run} is one snapshot and has no checkpoints: leave --checkpoint out")
    if weights != "average":
        raise UserError(f"{run} is a snapshot, which has only averaged weights: name the directory of its run")
    generator, config = load_snapshot(run, device)
    return generator.eval().requires_grad_(False), Diffusion.from_config(config.diffusion, device), config


def load_checkpoint(
    storage: CheckpointStorage,
    choice: Choice = "latest",
    device: torch.device | str = "cpu",
    weights: Weights = "average",
    ranks: Ranks | None = None,
) -> tuple[Loaded, Checkpoint]:
    """The generator of a checkpoint in a storage, see `load_run`, and the checkpoint that was taken.

    With `ranks` a collective: rank 0 chooses for all of them, and each host fetches the checkpoint once.
    """
    if ranks is None:
        checkpoint = choose_checkpoint(storage, choice)
        loaded = _load_generator(checkpoint, device, weights)
        storage.forget()
        return loaded, checkpoint
    try:
        fetched = fetch_for_ranks(storage, lambda: choose_checkpoint(storage, choice), ranks)
        assert fetched is not None
        return ranks.all_do(lambda: _load_generator(fetched, device, weights), CheckpointError), fetched
    finally:
        forget_for_ranks(storage, ranks)


def _load_generator(checkpoint: Checkpoint, device: torch.device | str, weights: Weights) -> Loaded:
    state, config = trained_generator(checkpoint, weights)
    generator = build_generator(config, device)
    generator.load_state_dict(state)
    generator.eval().requires_grad_(False)
    return generator, Diffusion.from_config(config.diffusion, device), config


def sample_run(
    run: Path,
    num: int,
    seed: int,
    choice: Choice | None = None,
    sampler: Sampler = "ancestral",
    classes: Sequence[int] | None = None,
    guidance: float = 1.0,
    fast: bool = False,
    weights: Weights = "average",
    seeds: Sequence[int] | None = None,
) -> Uint8Image:
    """`num` images of a run, uint8 [num, C, H, W], see `sample_batches`; shows progress on a terminal."""
    return sample_images(
        *load_run(run, choice, default_device(), weights),
        num=num,
        seed=seed,
        sampler=sampler,
        classes=classes,
        guidance=guidance,
        fast=fast,
        seeds=seeds,
        shows_progress=True,
    )


def default_device() -> torch.device:
    """Where images are drawn: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
