"""The generator, and the drawing of images, as graphs that plain torch loads: no code of this project is needed.

`images` maps (seed, numbers, classes, conditions) to the images that `trainer.sample` and `trainer.translate` draw,
because the random numbers are part of the graph. Both are exported on the CPU, in float32, for any number of images.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data.storage.errors import UserError
from models.diffusion import Diffusion, Sampler
from trainer.algorithm.methods import make_method
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import draw_batch, images_at_once, to_condition

IMAGES, GENERATOR = "images.pt2", "generator.pt2"
CONDITION = "condition"
MAX_TIMESTEPS = 64
"""Most steps that are exported: each is a copy of the generator's graph."""


class DrawImages(nn.Module):
    """Maps a seed, numbers, classes and conditions to images.

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

    def forward(
        self, seed: Tensor, numbers: Tensor, label: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The images of a seed.

        Args:
            seed: int64 [], in [0, 2**63).
            numbers: int64 [B]; image i of a seed is always the same.
            label: int64 [B], 0 .. num_classes - 1; only with classes.
            condition: uint8 [B, K, H, W]; only of a model that translates.

        Returns:
            uint8 [B, C, H, W].
        """
        given = None if condition is None else to_condition(condition, self._config, numbers.device)
        return draw_batch(
            self.generator, self._diffusion, self._config, seed, numbers, label, given, sampler=self._sampler
        )


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
    data = config.data
    numbers = torch.arange(images_at_once(data.image_size))
    inputs = {"seed": torch.tensor(0), "numbers": numbers}
    if data.num_classes:
        inputs["label"] = numbers % data.num_classes
    if data.condition_channels:
        shape = (len(numbers), data.condition_channels, data.image_size, data.image_size)
        inputs[CONDITION] = torch.randint(0, 256, shape, dtype=torch.uint8)
    return export_module(DrawImages(generator, diffusion, config, sampler), inputs)


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
    """The generator alone: the inputs of `generator_inputs` to its output."""
    return export_module(generator, generator_inputs(config, images_at_once(config.data.image_size)))


def generator_inputs(config: TrainConfig, num: int) -> dict[str, Tensor]:
    """Random inputs of a config's generator, for `num` images.

    Returns:
        x_t [num, C, H, W], t int64 [num], z [num, Z]; label int64 [num] with classes; condition [num, K, H, W], in the
        run's domain as x_t is, of a model that translates.
    """
    form, numbers = config.network_form, torch.arange(num)
    # A tensor of its own for each: export would take one that is given twice for one argument.
    inputs = {
        "x_t": torch.randn(num, *form.shape),
        "t": numbers % config.diffusion.num_timesteps,
        "z": torch.randn(num, config.generator.latent_dim),
    }
    if form.num_classes:
        inputs["label"] = numbers % form.num_classes
    if form.condition_channels:
        inputs[CONDITION] = torch.randn(num, form.condition_channels, form.size, form.size)
    return inputs


def write_programs(folder: Path, generator: nn.Module, diffusion: Diffusion, config: TrainConfig) -> None:
    """Export both into a folder that exists.

    Raises:
        UserError: as in `export_images`.
    """
    with quiet():
        save_program(export_images(generator, diffusion, config), folder / IMAGES)
        save_program(export_generator(generator, config), folder / GENERATOR)


def save_program(program: ExportedProgram, file: Path) -> None:
    """Write a program. Torch itself would end the process where the disk is full."""
    content = io.BytesIO()
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())


BATCH = {0: Dim("images", min=1, max=2**16)}
"""The first dimension of an input, which may have any length."""


def export_module(module: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """A module's forward pass as a graph, for any number of images; see `as_arguments`."""
    arguments, named = as_arguments(inputs)
    shapes = tuple(BATCH if value.dim() else {} for value in inputs.values())
    with torch.no_grad(), quiet():
        return torch.export.export(module, arguments, named, dynamic_shapes=shapes)


def as_arguments(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs as arguments in their order, and the condition by name: without classes, there is no label before it."""
    arguments = tuple(value for name, value in inputs.items() if name != CONDITION)
    return arguments, {name: value for name, value in inputs.items() if name == CONDITION}


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
