"""The generator, and the drawing of images, as graphs that plain torch loads: no code of this project is needed.

`images` maps (seed, numbers, classes) to the images that `trainer.sample` draws, because the random numbers are part of
the graph. Both are exported on the CPU, in float32, for any number of images.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data.storage.errors import UserError
from models.diffusion import Diffusion, Sampler
from trainer.algorithm.methods import make_method
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import draw_batch, images_at_once

IMAGES, GENERATOR = "images.pt2", "generator.pt2"
MAX_TIMESTEPS = 64
"""Most steps that are exported: each is a copy of the generator's graph."""


class DrawImages(nn.Module):
    """Maps a seed, numbers and classes to images.

    Args:
        generator: in eval mode, on the CPU.
        diffusion: tables on the CPU.
        config: config of the run.
        sampler: one that the run's objective knows.
    """

    def __init__(self, generator: nn.Module, diffusion: Diffusion, config: TrainConfig, sampler: Sampler) -> None:
        super().__init__()
        self.generator = generator
        self._diffusion, self._config = diffusion, config
        self._sampler: Sampler = sampler

    def forward(self, seed: Tensor, numbers: Tensor, label: Tensor | None = None) -> Tensor:
        """The images of a seed.

        Args:
            seed: int64 [], in [0, 2**63).
            numbers: int64 [B]; image i of a seed is always the same.
            label: int64 [B], 0 .. num_classes - 1; only with classes.

        Returns:
            uint8 [B, C, H, W].
        """
        return draw_batch(self.generator, self._diffusion, self._config, seed, numbers, label, sampler=self._sampler)


def export_images(
    generator: nn.Module, diffusion: Diffusion, config: TrainConfig, sampler: Sampler = "ancestral"
) -> ExportedProgram:
    """The drawing of images as one graph; takes seconds to a minute.

    Raises:
        UserError: a sampler that the run's objective does not know, or too many steps for one graph.
    """
    check_exportable(config)
    method = make_method(config.training, config.generator)
    if sampler not in method.samplers:
        raise UserError(f"sampler {sampler} does not fit this run; allowed: {', '.join(method.samplers)}")
    numbers = torch.arange(images_at_once(config.data.image_size))
    arguments = (torch.tensor(0), numbers, *([numbers % config.data.num_classes] if config.data.num_classes else []))
    return export_module(
        DrawImages(generator, diffusion, config, sampler), arguments, ({}, *[BATCH] * (len(arguments) - 1))
    )


def check_exportable(config: TrainConfig) -> None:
    """Refuse, before any work is done, a model whose loop is no reasonable graph.

    Raises:
        UserError: too many steps.
    """
    if config.diffusion.num_timesteps > MAX_TIMESTEPS:
        raise UserError(
            f"diffusion.num_timesteps is {config.diffusion.num_timesteps}, but a graph of the whole loop is written "
            f"for up to {MAX_TIMESTEPS}: export a model of fewer steps, or --to diffusers, which has no such graph"
        )


def export_generator(generator: nn.Module, config: TrainConfig) -> ExportedProgram:
    """The generator alone: (x_t [B, C, H, W], t int64 [B], z [B, Z], with classes label int64 [B]) to its output."""
    arguments = generator_arguments(config, images_at_once(config.data.image_size))
    return export_module(generator, arguments, (BATCH,) * len(arguments))


def generator_arguments(config: TrainConfig, num: int) -> tuple[Tensor, ...]:
    """Random inputs of a config's generator: x_t [num, C, H, W], t, z [num, Z], and with classes the label."""
    x_t, z = torch.randn(num, *config.network_form.shape), torch.randn(num, config.generator.latent_dim)
    numbers, classes = torch.arange(num), config.data.num_classes
    # A tensor of its own for each: export would take one that is given twice for one argument.
    return (x_t, numbers % config.diffusion.num_timesteps, z, *([numbers % classes] if classes else []))


def write_programs(folder: Path, generator: nn.Module, diffusion: Diffusion, config: TrainConfig) -> None:
    """Export both into a folder that exists.

    Raises:
        UserError: as in `export_images`.
    """
    with quiet():
        torch.export.save(export_images(generator, diffusion, config), folder / IMAGES)
        torch.export.save(export_generator(generator, config), folder / GENERATOR)


BATCH = {0: Dim("images", min=1, max=2**16)}
"""The first dimension of an input, which may have any length."""


def export_module(
    module: nn.Module, arguments: tuple[Tensor, ...], shapes: tuple[dict[int, Dim], ...]
) -> ExportedProgram:
    """A module's forward pass as a graph, for inputs whose dimensions in `shapes` may have another length."""
    with torch.no_grad(), quiet():
        return torch.export.export(module, arguments, dynamic_shapes=shapes)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch's exporters do not warn of their own deprecations and of libraries that are not needed here."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)
