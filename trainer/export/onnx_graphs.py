"""The generator, and its denoising loop, as ONNX graphs for runtimes without Python or torch.

ONNX has no arithmetic of 64-bit words that every runtime knows, so that random numbers are inputs of the loop here.
Each graph is run once with onnxruntime on 16 images and compared with torch before it is kept.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from data.storage.errors import OperationError, UserError
from models.diffusion import Diffusion, sample
from models.wavelets import Domain, from_pixels, to_pixels
from trainer.algorithm.methods import make_method
from trainer.config.train_config import TrainConfig
from trainer.export import programs

LOOP, GENERATOR = "images.onnx", "generator.onnx"
OPSET = 20
CHECKED_IMAGES = 16
MAX_DIFFERENCE = 1e-4
"""Largest difference from torch of a pixel in [-1, 1]."""
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


class DenoisingLoop(nn.Module):
    """Maps noise to images."""

    def __init__(self, generator: nn.Module, diffusion: Diffusion, config: TrainConfig) -> None:
        super().__init__()
        self.generator = generator
        self._diffusion = diffusion
        self._domain: Domain = config.data.domain
        self._method = make_method(config.training, config.generator)

    def forward(
        self,
        noise_T: Tensor,
        z: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draw images.

        Args:
            noise_T: standard normal [B, C, H, W].
            z: standard normal [B, T, Z]; entry t is for step t.
            noise: standard normal [B, T, C, H, W]; entry 0 has no effect.
            label: int64 [B]; only with classes.
            condition: pixels in [-1, 1], float32 [B, K, H, W]; only of a model that translates.

        Returns:
            Pixels in [-1, 1], float32 [B, C, H, W].
        """
        present = {} if label is None else {"label": label}
        if condition is not None:
            present["condition"] = from_pixels(condition, self._domain)
        generate = partial(self.generator, **present)

        def draw(t: int) -> tuple[Tensor, Tensor]:
            return z[:, t], noise[:, t]

        predictor = self._method.x0_predictor(generate, self._diffusion)
        x0 = sample(predictor, self._diffusion, noise_T=noise_T, draw=draw)
        return to_pixels(x0, self._domain).clamp(-1.0, 1.0)


def check_exportable(config: TrainConfig) -> None:
    """Refuse what cannot be written, before any work is done.

    Raises:
        UserError: a library is not installed, or the model has too many steps.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to onnx needs {' and '.join(missing)}, which this Python does not have: install the extra export, "
            "pip install '.[export]'"
        )
    programs.check_exportable(config)


def write_onnx(folder: Path, generator: nn.Module, diffusion: Diffusion, config: TrainConfig) -> None:
    """Write both graphs into a folder that exists; takes seconds to a minute.

    Raises:
        OperationError: onnxruntime computes something else than torch.
    """
    shape, steps = config.network_form.shape, diffusion.num_timesteps
    of_generator = programs.generator_inputs(config, CHECKED_IMAGES)
    write_graph(folder / GENERATOR, generator, of_generator, "output")

    inputs = {
        "noise_T": torch.randn(CHECKED_IMAGES, *shape),
        "z": torch.randn(CHECKED_IMAGES, steps, config.generator.latent_dim),
        "noise": torch.randn(CHECKED_IMAGES, steps, *shape),
        **{name: value for name, value in of_generator.items() if name == "label"},
    }
    if config.data.condition_channels:
        form = (config.data.condition_channels, config.data.image_size, config.data.image_size)
        inputs[programs.CONDITION] = torch.randn(CHECKED_IMAGES, *form)
    write_graph(folder / LOOP, DenoisingLoop(generator, diffusion, config), inputs, "images")


def write_graph(file: Path, module: nn.Module, inputs: dict[str, Tensor], output: str) -> None:
    """Write a module as a graph.

    Args:
        file: where to.
        module: its forward pass takes the inputs in their order.
        inputs: by name, as in `programs.as_arguments`; their first dimension may have any length later.
        output: name of the output.

    Raises:
        OperationError: onnxruntime computes something else than torch for these inputs.
    """
    program = programs.export_module(module.eval(), inputs)
    arguments, named = programs.as_arguments(inputs)
    with torch.no_grad():
        expected = module(*arguments, **named)
    _save(program, file, list(inputs), output)
    difference = (_run(file)(inputs) - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise OperationError(
            f"{file.name} is not kept: onnxruntime's output differs from torch's by {difference:.2g}, and at most "
            f"{MAX_DIFFERENCE:g} is allowed"
        )


def _save(program: ExportedProgram, file: Path, inputs: list[str], output: str) -> None:
    with programs.quiet():
        written = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=[output], verbose=False
        )
    assert written is not None
    written.save(file)


def _run(file: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """The graph in onnxruntime, as a function of its inputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(output)

    return run
