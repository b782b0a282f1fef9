"""What a discriminator and a generator's encoder have in common."""

import torch
from torch import nn

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.networks import build_discriminator, build_generator, shared_with_encoder
from models.shapes import ImageForm

FORM = ImageForm(32, 3)


def networks(base: int, *multipliers: int, of_d: int) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        generator = build_generator(GeneratorConfig(base_channels=base, channel_multipliers=multipliers), FORM)
        return build_discriminator(DiscriminatorConfig(base_channels=of_d), FORM), generator


def twins(shared: dict[str, str]) -> set[tuple[str, str]]:
    return {(own.rpartition(".conv")[0], twin.rpartition(".conv")[0]) for own, twin in shared.items() if ".conv" in own}


def test_blocks_are_matched_in_their_order_by_the_shape_of_their_convolutions():
    discriminator, generator = networks(16, 1, 2, of_d=8)  # D: 16 to 16, 32, 64, 64; G: 16 to 16 thrice, 32 often
    shared = shared_with_encoder(discriminator, generator)
    assert twins(shared) == {("blocks.0", "down.0.blocks.0"), ("blocks.1", "down.1.blocks.0")}
    # The first has no convolution in the generator's shortcut; none of the embedding of the step is taken.
    assert [name for name in shared if "shortcut" in name] == ["blocks.1.shortcut.weight"]
    assert not [name for name in shared if "time" in name]
    own, theirs = dict(discriminator.named_parameters()), dict(generator.named_parameters())
    assert len(shared) == 9 and all(own[name].shape == theirs[twin].shape for name, twin in shared.items())


def test_a_block_of_the_encoder_is_taken_once_and_the_decoder_never():
    discriminator, generator = networks(16, 1, 1, of_d=2)  # D ends with 16 to 16
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "down.0.blocks.0")}
    generator.down = nn.ModuleList()
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "middle_block1")}
    del generator.middle_block1, generator.middle_block2
    assert not shared_with_encoder(discriminator, generator)
