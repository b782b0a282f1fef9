"""What a training step needs, on the meta device: networks, a batch, and forward passes with the casts of a GPU."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.layers import recompute_blocks
from models.networks.build import build_discriminator, build_generator, without_values
from models.shapes import Image
from trainer.algorithm.method import PART_NAMES, Method, Part, Players
from trainer.algorithm.pairs import Conditions, Labels, RawBatch, given
from trainer.algorithm.randomness import Draws
from trainer.config.train_config import TrainConfig, split_batch
from trainer.engine.frozen import freeze
from trainer.plan.cuda_autocast import CudaAutocast

META = torch.device("meta")


def networks_on_meta(config: TrainConfig, method: Method[Any]) -> dict[Part, nn.Module]:
    """The networks that a method trains."""
    with without_values():
        generator = build_generator(config.generator, config.network_form, config.noise_levels)
        networks: dict[Part, nn.Module] = {"g": generator}
        if "d" in method.parts:
            networks["d"] = build_discriminator(config.discriminator, config.network_form)
    for part, network in networks.items():
        freeze(network, PART_NAMES[part], config.training.freeze)
        if config.engine.checkpoint_activations:
            recompute_blocks(network, CudaAutocast.contexts)
    return networks


def raw_batch_on_meta(config: TrainConfig) -> RawBatch:
    """The images of one forward pass of one rank, from which a method draws."""
    form, batch_size = config.image_form, split_batch(config).micro_batch_size

    def images(channels: int) -> Tensor:
        return torch.empty((batch_size, channels, form.size, form.size), dtype=torch.uint8, device=META)

    labels = conditions = None
    if form.num_classes:
        classes = torch.zeros(batch_size, dtype=torch.int64, device=META)
        labels = Labels(classes, form.num_classes, config.training.label_dropout)
    if form.condition_channels:
        conditions = Conditions(images(form.condition_channels), config.training.condition_dropout)
    return RawBatch(
        images(form.channels),
        Draws(0, 0, torch.empty(batch_size, dtype=torch.int64, device=META)),
        config.generator.latent_dim,
        config.data.horizontal_flip,
        share=1.0,
        labels=labels,
        group_size=split_batch(config).group_size,
        domain=config.data.domain,
        conditions=conditions,
    )


def given_on_meta(config: TrainConfig, batch_size: int) -> tuple[Tensor | None, ...]:
    """What a network gets after its images, latent and steps, see `given`."""
    form = config.network_form
    label = torch.zeros(batch_size, dtype=torch.int64, device=META) if form.num_classes else None
    shape = (batch_size, form.condition_channels, form.size, form.size)
    return given(label, torch.empty(shape, device=META) if form.condition_channels else None)


class PlayersOnMeta(Players):
    """Players whose forward passes cast as on a GPU."""

    def autocast(self, x_t: Image) -> AbstractContextManager:
        """The casts of autocast on a GPU."""
        return CudaAutocast() if self.bf16 else nullcontext()


class OneKernelAttention(TorchFunctionMode):
    """Inside, attention is one operation that keeps no matrix of pixels by pixels, as on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace attention."""
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        if query.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
