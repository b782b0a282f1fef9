"""Builds the networks that a config describes."""

from collections.abc import Sequence

from torch import nn

from models.discriminator import Discriminator, DiscriminatorConfig
from models.generator import Generator, GeneratorConfig
from models.mlp import MlpDiscriminator, MlpGenerator
from models.shapes import ImageForm


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
    if config.kind == "mlp":
        return MlpDiscriminator(config, form)
    return Discriminator(config, form)


def _refuse_condition(kind: str, form: ImageForm, network: str) -> None:
    if kind == "mlp" and form.condition_channels:
        raise ValueError(
            f"data.condition_channels is {form.condition_channels}, but {network}.kind is mlp, which takes points, not "
            f"conditions: set {network}.kind to another one, or data.condition_channels to 0"
        )
