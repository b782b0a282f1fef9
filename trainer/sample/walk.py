"""A walk between samples: frames whose noise, latents and class lead from one sample to the next.

A mixture cos(a) x + sin(a) y of independent standard normals is standard normal as well, so each frame is as likely a
sample as its neighbours; a straight line would leave the sphere on which the noise of images lies.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.storage.errors import UserError
from models.diffusion import Diffusion, sample
from models.shapes import Uint8Image
from models.wavelets import to_pixels
from trainer.algorithm.methods import make_method
from trainer.algorithm.randomness import Draws, Purpose
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import NEEDS_CONDITIONS, images_at_once
from trainer.sample.images import to_uint8


@dataclass(frozen=True)
class SampleNoise:
    """All random numbers of B images.

    Attributes:
        start: the image at t = T, pure noise.
        z: the latent of each step.
        posterior: the noise of each step; that of step 0 has no effect.
    """

    start: Float[Tensor, "b c h w"]
    z: Float[Tensor, "b t nz"]
    posterior: Float[Tensor, "b t c h w"]

    def between(self, start: Tensor, end: Tensor, share: Tensor) -> "Between":
        """The noise on the way from images `start` to images `end`, for each frame."""
        return Between(self, start, end, share * (math.pi / 2))


@dataclass(frozen=True)
class Between:
    """Noise on the way from some images to others, mixed where it is used.

    Attributes:
        corners: the noise of all images.
        start, end: numbers of images, int64 [F].
        angle: 0 at the start, pi / 2 at the end, [F].
    """

    corners: SampleNoise
    start: Tensor
    end: Tensor
    angle: Tensor

    def mixed(self, values: Tensor) -> Tensor:
        """Values of the images, [B, ...], on the way: [F, ...]."""
        cos, sin = (f(self.angle).view(-1, *[1] * (values.dim() - 1)) for f in (torch.cos, torch.sin))
        return cos * values[self.start] + sin * values[self.end]

    def of_step(self, t: int) -> tuple[Tensor, Tensor]:
        """z and the posterior's noise of a step."""
        return self.mixed(self.corners.z[:, t]), self.mixed(self.corners.posterior[:, t])


def noise_of(seeds: Sequence[int], config: TrainConfig, device: torch.device | str = "cpu") -> SampleNoise:
    """The random numbers of the first image of each seed, as `trainer.sample.draw` draws them."""
    T, shape = config.diffusion.num_timesteps, config.network_form.shape
    keys, first = torch.tensor(seeds, device=device), torch.zeros(len(seeds), dtype=torch.int64, device=device)
    steps = [Draws(keys, t, first) for t in range(T)]
    return SampleNoise(
        start=Draws(keys, T, first).normals(Purpose.SAMPLE_NOISE_T, shape),
        z=torch.stack([d.normals(Purpose.SAMPLE_LATENT, (config.generator.latent_dim,)) for d in steps], dim=1),
        posterior=torch.stack([d.normals(Purpose.SAMPLE_NOISE_POSTERIOR, shape) for d in steps], dim=1),
    )


def walk(
    generator: nn.Module,
    diffusion: Diffusion,
    config: TrainConfig,
    *,
    seeds: Sequence[int],
    num_frames: int,
    classes: Sequence[int] | None = None,
    closed: bool = True,
) -> Iterator[Uint8Image]:
    """The frames of a walk, some at a time, on the CPU.

    Args:
        generator: in evaluation mode, on the device where the frames are drawn.
        diffusion: tables on the same device.
        config: the run's config.
        seeds: the walk leads from the first image of each seed to that of the next, at least two.
        num_frames: of the whole walk.
        classes: that of each seed, in turn; embeddings are mixed between two. None: class 0 for all.
        closed: return to the first seed at the end, without a frame that repeats the first one.

    Raises:
        UserError: there are too few seeds or frames, or the model has other classes.
    """
    if config.image_form.is_point:
        raise UserError("this run draws points in the plane, not images")
    if config.data.condition_channels:
        raise UserError(NEEDS_CONDITIONS)
    num_legs = len(seeds) if closed else len(seeds) - 1
    if len(seeds) < 2:
        raise UserError(f"a walk needs at least two seeds, but {len(seeds)} is given")
    if num_frames < num_legs + (not closed):
        raise UserError(f"{num_frames} frames are wanted, but {len(seeds)} seeds need one each at least")
    labels = _labels(classes, config.data.num_classes, len(seeds))
    device = next(generator.parameters()).device
    corners, batch = noise_of(seeds, config, device), images_at_once(config.data.image_size)
    places = torch.arange(num_frames, device=device) * num_legs / (num_frames if closed else num_frames - 1)
    method = make_method(config.training, config.generator)
    for at in places.split(batch):
        start = at.floor().long().clamp(max=num_legs - 1)
        share, end = at - start, (start + 1) % len(seeds)
        noise = corners.between(start, end, share)
        with _mixed_labels(generator, labels, start, end, share) if labels is not None else nullcontext():
            given = {} if labels is None else {"label": labels.to(device)[start]}
            predictor = method.x0_predictor(lambda x_t, t, z, given=given: generator(x_t, t, z, **given), diffusion)
            x0 = sample(predictor, diffusion, noise_T=noise.mixed(corners.start), draw=noise.of_step)
        yield to_uint8(to_pixels(x0, config.data.domain)).cpu()


def _labels(classes: Sequence[int] | None, num_classes: int, num_seeds: int) -> Tensor | None:
    if classes is None:
        return torch.zeros(num_seeds, dtype=torch.int64) if num_classes else None
    if not num_classes:
        raise UserError("classes are given, but this run was trained without classes: data.num_classes is 0")
    if not classes or not all(0 <= label < num_classes for label in classes):
        raise UserError(f"classes are {', '.join(map(str, classes)) or 'none'}; allowed: 0 to {num_classes - 1}")
    if len(classes) > num_seeds:
        raise UserError(f"{len(classes)} classes are given for {num_seeds} seeds: give one for each seed, or fewer")
    return torch.tensor([classes[i % len(classes)] for i in range(num_seeds)])


@contextmanager
def _mixed_labels(generator: nn.Module, labels: Tensor, start: Tensor, end: Tensor, share: Tensor) -> Iterator[None]:
    """Inside, the generator's label embedding gives mixtures of two labels' vectors."""
    embedding = generator.get_submodule("mapping.label.embedding")
    vectors: Tensor = embedding.weight  # pyright: ignore[reportAssignmentType]
    labels = labels.to(vectors.device)
    mixed = torch.lerp(vectors[labels[start]], vectors[labels[end]], share[:, None])
    handle = embedding.register_forward_hook(lambda *_: mixed)
    try:
        yield
    finally:
        handle.remove()
