"""Small parts of the networks: initialization, blocks, group norm, embeddings, and convolutions in channels_last.

channels_last is the layout on a GPU, where convolutions take no other without a copy. For R1, the second derivatives of
`Convolution` are made of ordinary convolutions in that layout. torch's own double backward computes the
weight's gradient by a convolution of transposed feature maps: it copies both, and the filter is as large as the image.
Here it is the same weight gradient as in any backward pass, as in StyleGAN3's `conv2d_gradfix`. Numbers differ by
rounding only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from models.dropout import draws_masks, same_masks
from models.fused.norm import group_norm as group_norm_with_style
from models.fused.operator import can_fuse
from models.fused.whole_norm import norm_of, slab_of
from models.shapes import Embedding, Features, Label, NoiseLevel, Style, Timestep

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)
Fan = Literal["average", "out"]

# Scale of layers whose initial output should be near zero, but which still get a gradient.
NEAR_ZERO = 1e-10


def initialized(layer: LayerT, *, fan: Fan = "average", scale: float = 1.0) -> LayerT:
    """Draw a layer's weights from U(-l, l), l = sqrt(3 scale / fan), with torch's global generator; zero its biases.

    Args:
        layer: Linear or convolution, changed in place.
        fan: `average` of fan-in and fan-out, used in most of the generator, or fan-`out`.
        scale: Variance of the weights times the fan.
    """
    area = layer.weight[0, 0].numel()
    fan_out = layer.weight.shape[0] * area
    fan_in = layer.weight.shape[1] * area
    limit = math.sqrt(3 * scale / (fan_out if fan == "out" else (fan_in + fan_out) / 2))
    nn.init.uniform_(layer.weight, -limit, limit)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]
"""Makes the contexts of a forward pass and of its repetition, for those that autograd and autocast know nothing of."""


class Block(nn.Module):
    """A block that can save memory: if it `recomputes`, it keeps only its inputs for the backward pass.

    The backward pass then computes the block again, from the same inputs and with the same dropout masks, so that all
    results are the same. Second derivatives work.
    """

    recomputes = False
    contexts: Contexts = staticmethod(noop_context_fn)

    def __call__(self, *inputs: Tensor) -> Any:
        """The forward pass."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        masks, run = same_masks(self), super().__call__

        def with_masks(*inputs: Tensor) -> Any:
            with masks():
                return run(*inputs)

        return checkpoint(
            with_masks,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=draws_masks(self),
            context_fn=self.contexts,
        )


def recompute_blocks(network: nn.Module, contexts: Contexts = noop_context_fn) -> None:
    """Let the blocks of a network keep only their inputs for the backward pass."""
    for block in network.modules():
        if isinstance(block, Block):
            block.recomputes, block.contexts = True, contexts


def are_whole(*layers: nn.Module) -> bool:
    """Whether a block may use the weights of its layers itself: with ZeRO-3 they are there only while a layer runs."""
    return not any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters(recurse=False))


class GroupNorm(nn.GroupNorm):
    """Group norm with SiLU, and with scale and shift that differ by sample, in one operation on a GPU.

    Where the input is used again, take the other results for it, as their gradients are then added within the norm.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Features,
        style: Style | None = None,
        *,
        silu: bool = False,
        skip: Float[Tensor, "b c_skip h w"] | None = None,
        shift: Float[Tensor, "#b c_sum"] | None = None,
    ) -> tuple[Float[Tensor, "b c_sum h w"], Float[Tensor, "b c_sum h w"], Float[Tensor, "b c_sum h w"]]:
        """Normalize the input.

        Args:
            input: Features.
            style: Scale, then shift of each channel for each sample. Required unless the module has its own (`affine`).
            silu: Apply SiLU to the result.
            skip: More channels of the input.
            shift: Added to each channel before the norm.

        Returns:
            The result, and twice the input with all its channels.
        """
        fuses = can_fuse(input) and (skip is None or (can_fuse(skip) and skip.dtype == input.dtype))
        style = torch.cat([self.weight, self.bias])[None] if style is None and fuses else style
        if fuses and slab_of(input.shape[2] * input.shape[3], self.num_channels, self.num_groups):
            return norm_of(input, skip, shift, style, self.num_groups, self.eps, silu)
        x = input if skip is None else torch.cat([input, skip], dim=1)
        h = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
        if style is not None:
            return group_norm_with_style(h, style, self.num_groups, self.eps, silu), x, x
        h = super().forward(h)
        return (F.silu(h) if silu else h), x, x


def group_norm(num_channels: int, *, affine: bool = True) -> GroupNorm:
    """Group norm with min(C // 4, 32) groups.

    Raises:
        ValueError: The groups cannot be of equal size.
    """
    num_groups = min(num_channels // 4, 32)
    if num_groups == 0 or num_channels % num_groups:
        raise ValueError(
            f"a layer of {num_channels} channels cannot be split into {num_groups} equal groups for group norm. Layers "
            "are base_channels x channel_multipliers wide, or the sum of two such widths where a skip joins: choose "
            "base_channels and channel_multipliers so that each width is a multiple of 4, and from 128 on of 32"
        )
    return GroupNorm(num_groups, num_channels, eps=1e-6, affine=affine)


class SinusoidalEmbedding(nn.Module):
    """[sin | cos] of t at geometrically spaced frequencies (DDPM, arXiv 2006.11239)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(
                f"a time embedding of width {width} cannot be split into sines and cosines: set the generator's "
                "base_channels and the discriminator's time_embedding_dim to even numbers of at least 4"
            )
        self.width = width
        half = width // 2
        # Always on the CPU: on the meta device, where every command builds the networks of its config first, torch
        # computes such a row in Python, and imports its compiler for it, which takes longer than all the rest.
        frequencies = torch.exp(torch.arange(half, device="cpu") * -(math.log(10_000) / (half - 1)))
        self.register_buffer("frequencies", frequencies.to(torch.get_default_device()), persistent=False)

    def forward(self, t: Timestep | NoiseLevel) -> Embedding:
        """Embed each step index."""
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """[sin | cos] of log(t + 1) at fixed random frequencies.

    The published code uses log(t), which is -inf at t = 0. Networks trained with it get different inputs here.
    """

    frequencies: Tensor

    def __init__(self, num_frequencies: int, scale: float) -> None:
        super().__init__()
        self.width = 2 * num_frequencies
        # Random, so they must be saved in the state dict.
        self.register_buffer("frequencies", torch.randn(num_frequencies) * scale)

    def forward(self, t: Timestep) -> Embedding:
        """Embed each step index."""
        phase = 2 * math.pi * torch.log(t[:, None].to(self.frequencies) + 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class NoiseLevelEmbedding(SinusoidalEmbedding):
    """[sin | cos] of 100 ln(sigma): ten units of ln(sigma) get the range of DDPM's thousand steps."""

    def forward(self, t: NoiseLevel) -> Embedding:
        """Embed each noise level."""
        return super().forward(100 * t.log())


class TimeEmbedding(nn.Module):
    """Two-layer perceptron over an embedding of t. Its output is already activated, because every user needs that."""

    def __init__(
        self, embedding: SinusoidalEmbedding | FourierEmbedding, width: int, activation: nn.Module, fan: Fan
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.linear1 = initialized(nn.Linear(embedding.width, width), fan=fan)
        self.linear2 = initialized(nn.Linear(width, width), fan=fan)
        self.activation = activation

    def forward(self, t: Timestep | NoiseLevel) -> Embedding:
        """Embed each step index, or each noise level, whichever `embedding` takes."""
        return self.activation(self.linear2(self.activation(self.linear1(self.embedding(t)))))


class LabelEmbedding(nn.Module):
    """A vector for each label. Row `num_classes` is the vector for "no label".

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        width: length of each vector.
        deviation: standard deviation of its initial values.
    """

    def __init__(self, num_classes: int, width: int, *, deviation: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding.weight, std=deviation)

    def forward(self, label: Label | None) -> Float[Tensor, "b width"]:
        """The vector of each label.

        Raises:
            ValueError: a network with classes was given no labels.
        """
        if label is None:
            raise ValueError("this network has classes but got no labels: pass num_classes for `no label`")
        return self.embedding(label)


def is_channels_last(x: Tensor) -> bool:
    """Whether features [B, C, H, W] have the layout channels_last and no other."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def join(parts: Sequence[Tensor]) -> Float[Tensor, "b c_sum h w"]:
    """Concatenate features [B, *, H, W] along their channels, in the layout of the first.

    torch.cat takes channels_last only if all parts have it, and its second derivative never has it.
    """
    if not is_channels_last(parts[0]):
        return torch.cat(list(parts), dim=1)
    by_pixel = [part.permute(0, 2, 3, 1).flatten(1, 2) for part in parts]  # [B, H W, *]
    return torch.cat(by_pixel, dim=2).unflatten(1, parts[0].shape[2:]).permute(0, 3, 1, 2)


class Convolution(nn.Conv2d):
    """`nn.Conv2d` with stride 1, and with the second derivative of this file where `convolve` has it."""

    def forward(self, input: Features) -> Float[Tensor, "b c_out h_out w_out"]:
        """Convolve."""
        return convolve(input, self.weight, self.bias, self.padding, self.groups)


def convolve(
    x: Features, weight: Tensor, bias: Tensor | None, padding: Any, groups: int = 1
) -> Float[Tensor, "b c_out h_out w_out"]:
    """`F.conv2d`; for features in channels_last outside autocast, with the second derivative of this file."""
    if (
        not torch.compiler.is_compiling()
        and is_channels_last(x)
        and x.requires_grad
        and torch.is_grad_enabled()
        and not _in_autocast(x)
    ):
        y = _Product.apply(x, weight, padding, groups)
        return y if bias is None else y.add_(bias[:, None, None])
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


def _in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x, or may be: on the meta device it is emulated."""
    device = x.device.type
    return not torch.amp.is_autocast_available(device) or torch.is_autocast_enabled(device)


_inputs_only = False


@contextmanager
def gradients_of_inputs() -> Iterator[None]:
    """Inside, backward passes skip the gradients of the weights: for R1's inner gradient, which asks for none.

    torch would tell its own operations, but not those written in Python.
    """
    global _inputs_only
    _inputs_only = True
    try:
        yield
    finally:
        _inputs_only = False


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Any, groups: int, wanted: int) -> Tensor:
    """Gradient of a convolution with stride 1: of x (`wanted` 0) or of the weight (1)."""
    mask = [wanted == 0, wanted == 1, False]
    arguments = (None, [1, 1], list(padding), [1, 1], False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(grad, x, weight, *arguments)[wanted]


class _Product(Function):
    """y = x * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: Any, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups = padding, groups
        return torch.conv2d(x, weight, padding=padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x = _InputGradient.apply(grad, weight, x, ctx.padding, ctx.groups) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1] and not _inputs_only
        of_weight = _gradient(grad, x, weight, ctx.padding, ctx.groups, 1) if wanted else None
        return of_x, of_weight, None, None


class _InputGradient(Function):
    """The gradient of x in `_Product`, linear in `grad` and in the weight; x gives only its shape."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, padding: Any, groups: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.padding, ctx.groups = padding, groups
        return _gradient(grad, x, weight, padding, groups, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, weight = ctx.saved_tensors
        of_grad = (
            torch.conv2d(grad, weight, padding=ctx.padding, groups=ctx.groups) if ctx.needs_input_grad[0] else None
        )
        of_weight = _gradient(grad_y, grad, weight, ctx.padding, ctx.groups, 1) if ctx.needs_input_grad[1] else None
        return of_grad, of_weight, None, None, None
