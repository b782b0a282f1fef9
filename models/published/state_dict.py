"""Loads the authors' state dicts into our networks (DDGAN, arXiv 2112.07804).

The published generator numbers its layers in call order as `all_modules.N` and its mapping network as `z_transform.N`;
this file walks our modules in the same order. The 1x1 attention layers (`NIN_0` .. `NIN_3`) store W transposed.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from models.blocks import AdaptiveGroupNorm, Attention, NoInput, ResidualBlock, ResidualInput, SkipInput
from models.discriminator import Discriminator, DownBlock
from models.generator import DownLevel, Generator, UpLevel
from models.layers import FourierEmbedding
from models.published.settings import discriminator_config, generator_config, image_form
from models.resample import FirBlur
from models.shapes import Image, Timestep

ATTENTION_NAMES = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}

MAX_KEYS_SHOWN = 3


class PublishedDiscriminator(nn.Module):
    """Our discriminator with logits in the published shape."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x_tm1: Image, x_t: Image, t: Timestep) -> Tensor:
        """Judge a denoising step; returns logits [B, 1]."""
        return self.discriminator(x_tm1, x_t, t)[:, None]


def generator_from(settings: Mapping[str, object], state: Mapping[str, Tensor]) -> Generator:
    """Build a generator in evaluation mode from published settings and weights; call it as generator(x_t, t, z).

    Args:
        settings: Published names. Missing ones get the published defaults; training settings are ignored.
        state: Published state dict, with or without the `module.` prefix.

    Raises:
        ValueError: A setting is unknown or not supported, or the state does not fit; the message names the first keys.
    """
    generator = Generator(generator_config(settings), image_form(settings))
    load_published(generator, state)
    return generator.eval()


def discriminator_from(settings: Mapping[str, object], state: Mapping[str, Tensor]) -> PublishedDiscriminator:
    """Build a discriminator from published settings and weights; call it as discriminator(x_tm1, x_t, t).

    The minibatch deviation is grouped as published. Its attribute `discriminator` is our network, which returns [B].

    Args:
        settings: Published names, and `kind`: small or large. Without `kind` it is inferred from the state.
        state: Published state dict, with or without the `module.` prefix.

    Raises:
        ValueError: A setting is unknown or not supported, or the state does not fit; the message names the first keys.
    """
    config = discriminator_config(settings, is_large="conv6.conv1.0.weight" in _without_prefix(state))
    discriminator = Discriminator(config, image_form(settings))
    load_published(discriminator, state)
    return PublishedDiscriminator(discriminator.eval())


def published_state(network: Generator | Discriminator) -> dict[str, Tensor]:
    """The network's state under the published names, in the published order. The tensors share its memory."""
    state = network.state_dict()
    return {theirs: _transposed(theirs, state[ours]) for ours, theirs in published_names(network).items()}


@torch.no_grad()
def load_published(network: Generator | Discriminator, state: Mapping[str, Tensor]) -> None:
    """Copy a published state dict into one of our networks.

    Raises:
        ValueError: Names or shapes differ; the message lists the first ones.
    """
    state = _without_prefix(state)
    expected = published_state(network)
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "the state dict does not fit the settings: "
            + "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names)
            + ". Give the settings with which these weights were trained"
        )
    for name, tensor in expected.items():
        tensor.copy_(state[name])


def published_names(network: Generator | Discriminator) -> dict[str, str]:
    """Map our parameter names to the published ones, in the published order."""
    layers = _generator_layers(network) if isinstance(network, Generator) else _discriminator_layers(network)
    ours = {module: name for name, module in network.named_modules()}
    names: dict[str, str] = {}
    for layer, theirs in layers:
        for suffix, _ in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            names[f"{ours[layer]}.{suffix}"] = f"{theirs}.{_suffix(theirs, suffix)}"
    return names


def _generator_layers(generator: Generator) -> Iterator[tuple[nn.Module, str]]:
    """Every layer with weights and its published name."""
    for i, module in enumerate(_call_order(generator)):
        for layer, inner in _inner_layers(module):
            yield layer, f"all_modules.{i}{inner}"
    # Entry 0 normalizes z, and an activation follows every layer.
    for i, layer in enumerate(generator.mapping.layers):
        yield layer, f"z_transform.{1 + 2 * i}"


def _call_order(generator: Generator) -> Iterator[nn.Module]:
    """The modules that the published generator numbers."""
    time = generator.time_embedding
    if isinstance(time.embedding, FourierEmbedding):
        yield time.embedding
    yield from (time.linear1, time.linear2, generator.conv_in)
    for level in cast("list[DownLevel]", list(generator.down)):
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            yield block
            if isinstance(attention, Attention):
                yield attention
        if level.downsample is not None:
            yield level.downsample
            if not isinstance(level.pyramid, NoInput):
                yield level.pyramid
    yield from (generator.middle_block1, generator.middle_attention, generator.middle_block2)
    for level in cast("list[UpLevel]", list(generator.up)):
        yield from level.blocks
        if isinstance(level.attention, Attention):
            yield level.attention
        if level.to_image is not None:
            yield from (level.to_image.norm, level.to_image.conv)
        if level.upsample is not None:
            yield level.upsample
    if generator.config.progressive_output == "none":
        yield from (generator.norm_out, generator.conv_out)


def _inner_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The layers with weights inside one numbered module, and their published suffix."""
    match module:
        case ResidualBlock():
            yield module.norm1.style, ".GroupNorm_0.style"
            yield module.conv1, ".Conv_0"
            yield module.time, ".Dense_0"
            if isinstance(module.norm2, AdaptiveGroupNorm):
                yield module.norm2.style, ".GroupNorm_1.style"
            else:
                yield module.norm2, ".GroupNorm_1"
            yield module.conv2, ".Conv_1"
            yield module.shortcut, ".Conv_2"
        case Attention():
            for ours, theirs in ATTENTION_NAMES.items():
                yield module.get_submodule(ours), f".{theirs}"
        case ResidualInput():
            yield module.conv, ".Conv2d_0" if isinstance(module.prepare, FirBlur) else ".Conv_0"
        case SkipInput():
            yield module.conv, ".Conv_0"
        case _:
            yield module, ""


def _discriminator_layers(discriminator: Discriminator) -> Iterator[tuple[nn.Module, str]]:
    """Every layer with weights and its published name."""
    time = discriminator.time_embedding
    yield time.linear1, "t_embed.main.0"
    yield time.linear2, "t_embed.main.2"
    yield discriminator.conv_in, "start_conv"
    for i, block in enumerate(cast("list[DownBlock]", list(discriminator.blocks)), start=1):
        yield block.conv1, f"conv{i}.conv1.0"
        yield block.conv2, f"conv{i}.conv2.0"
        yield block.time, f"conv{i}.dense_t1"
        yield block.shortcut, f"conv{i}.skip.0"
    yield discriminator.conv_out, "final_conv"
    yield discriminator.head, "end_linear"


def _suffix(layer_name: str, ours: str) -> str:
    """The published name of a weight or bias."""
    if ".NIN_" in layer_name:
        return {"weight": "W", "bias": "b"}[ours]
    return {"frequencies": "W"}.get(ours, ours)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """The tensor in the published layout."""
    return tensor.T if ".NIN_" in name and tensor.ndim == 2 else tensor


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefix that a data-parallel wrapper adds."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _first(names: list[str]) -> str:
    """The first names of a list, with an ellipsis if there are more."""
    return ", ".join(names[:MAX_KEYS_SHOWN]) + (", ..." if len(names) > MAX_KEYS_SHOWN else "")
