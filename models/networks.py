"""Builds the networks that a config describes."""

from torch import nn

from models.discriminator import Discriminator, DiscriminatorConfig
from models.generator import Generator, GeneratorConfig
from models.mlp import MlpDiscriminator, MlpGenerator


def build_generator(
    config: GeneratorConfig, *, image_size: int, image_channels: int, num_classes: int = 0
) -> Generator | MlpGenerator:
    """A generator with fresh weights, drawn from torch's global generator.

    Args:
        config: Architecture; `kind` chooses the class.
        image_size: Side of the square images in pixels.
        image_channels: Channels of the images.
        num_classes: Number of labels; 0: unconditional.

    Raises:
        ValueError: The image size does not fit the config.
    """
    kind = MlpGenerator if config.kind == "mlp" else Generator
    return kind(config, image_size=image_size, image_channels=image_channels, num_classes=num_classes)


def build_discriminator(
    config: DiscriminatorConfig, *, image_size: int, image_channels: int, num_classes: int = 0
) -> nn.Module:
    """A discriminator with fresh weights; see `build_generator`."""
    if config.kind == "mlp":
        return MlpDiscriminator(config, image_size=image_size, image_channels=image_channels, num_classes=num_classes)
    return Discriminator(config, image_channels=image_channels, num_classes=num_classes)
