"""Builds the networks that a config describes, and finds what they have in common."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.blocks import ResidualBlock
from models.discriminator import Discriminator, DiscriminatorConfig, DownBlock
from models.generator import Generator, GeneratorConfig
from models.networks.mlp import MlpDiscriminator, MlpGenerator
from models.networks.resnext import ResNeXtDiscriminator
from models.shapes import ImageForm


@contextmanager
def without_values() -> Iterator[None]:
    """Networks that are built in this context are on the meta device: they have shapes, and no memory.

    They draw no random numbers, either. On that device torch would compute an initialization in Python, and import its
    compiler for it: a second in every command that reads a config.
    """
    with torch.device("meta"), _Uninitialized():
        yield


class _Uninitialized(TorchFunctionMode):
    """Leaves out what fills a tensor with random numbers."""

    DRAWS = frozenset(
        {torch.Tensor.normal_, torch.Tensor.uniform_}
        | {function for name, function in vars(nn.init).items() if name.endswith(("normal_", "uniform_"))}
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_generator(
    config: GeneratorConfig, form: ImageForm, noise_levels: Sequence[float] = ()
) -> Generator | MlpGenerator:
    """A generator with fresh weights, drawn from torch's global generator.

    Args:
        config: Architecture; `kind` chooses the class.
        form: Size, channels and classes of the images.
        noise_levels: sigma of the input of each step, for networks that see it.

    Raises:
        ValueError: The image size does not fit the config, or a condition does not.
    """
    _refuse_condition(config.kind, form, "generator")
    kind = MlpGenerator if config.kind == "mlp" else Generator
    return kind(config, form, noise_levels)


def build_discriminator(config: DiscriminatorConfig, form: ImageForm) -> nn.Module:
    """A discriminator with fresh weights; see `build_generator`."""
    _refuse_condition(config.kind, form, "discriminator")
    kinds = {"mlp": MlpDiscriminator, "resnext": ResNeXtDiscriminator}
    return kinds.get(config.kind, Discriminator)(config, form)


def _refuse_condition(kind: str, form: ImageForm, network: str) -> None:
    if kind == "mlp" and form.condition_channels:
        raise ValueError(
            f"data.condition_channels is {form.condition_channels}, but {network}.kind is mlp, which takes points, not "
            f"conditions: set {network}.kind to another one, or data.condition_channels to 0"
        )


def shared_with_encoder(discriminator: nn.Module, generator: nn.Module) -> dict[str, str]:
    """Parameters of a discriminator that can start as those of a generator's encoder: the names there, by name.

    Blocks are matched in their order: each with the next one of the encoder, the middle included, whose convolutions
    have the same shape. The convolutions of such a pair have the same names. All else is of another kind: the
    discriminator has no norms, and embeds the step in its own way.
    """
    blocks = [
        (name, block)
        for name, block in generator.named_modules()
        if isinstance(block, ResidualBlock) and not name.startswith("up.")
    ]
    shared: dict[str, str] = {}
    for name, block in discriminator.named_modules():
        if not isinstance(block, DownBlock):
            continue
        for i, (twin_name, twin) in enumerate(blocks):
            if twin.conv1.weight.shape == block.conv1.weight.shape:
                theirs = dict(twin.named_parameters())
                shared |= {
                    f"{name}.{parameter}": f"{twin_name}.{parameter}"
                    for parameter in dict(block.named_parameters())
                    if parameter in theirs and not parameter.startswith("time.")
                }
                blocks = blocks[i + 1 :]
                break
    return shared
