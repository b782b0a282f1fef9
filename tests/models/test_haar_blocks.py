"""Frequency-aware blocks against their formulas in float64, and how the generator joins them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.generator import Generator, GeneratorConfig
from models.haar_blocks import HaarDownBlock, HaarInput, HaarMiddleBlock, HaarUpBlock, split, unsplit
from models.shapes import ImageForm

OPTIONS = {
    "time_channels": 6,
    "latent_channels": 5,
    "dropout": 0.0,
    "second_norm_adaptive": True,
    "skip_rescale": True,
}
G = GeneratorConfig(
    base_channels=8,
    channel_multipliers=(1, 2, 3),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_dim=4,
    latent_embedding_dim=5,
    resample="haar",
)
FORM = ImageForm(16, 12)


def awakened(network: nn.Module) -> nn.Module:
    """In float64, without weights near zero, which would hide errors."""
    torch.manual_seed(1)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network.double()


def inputs(channels: int = 8, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in ((channels, size, size), (6,), (5,)))  # pyright: ignore


def orthonormal(x: Tensor) -> list[Tensor]:
    """LL, LH, HL, HH of each block [p q; r s], by the transform's matrices."""
    low, high = np.array([1.0, 1.0]) / math.sqrt(2), np.array([-1.0, 1.0]) / math.sqrt(2)
    B, C, H, W = x.shape
    blocks = x.detach().numpy().reshape(B, C, H // 2, 2, W // 2, 2)
    pairs = ((low, low), (high, low), (low, high), (high, high))
    return [torch.from_numpy(np.einsum("bcyixj,i,j->bcyx", blocks, v, h)) for v, h in pairs]


def restored(bands: list[Tensor]) -> Tensor:
    """The inverse of `orthonormal`: the transposed matrices."""
    low, high = np.array([1.0, 1.0]) / math.sqrt(2), np.array([-1.0, 1.0]) / math.sqrt(2)
    pairs = ((low, low), (high, low), (low, high), (high, high))
    x = sum(np.einsum("bcyx,i,j->bcyixj", b.detach().numpy(), v, h) for b, (v, h) in zip(bands, pairs, strict=True))
    B, C, H, _, W, _ = x.shape  # pyright: ignore
    return torch.from_numpy(x.reshape(B, C, 2 * H, 2 * W))  # pyright: ignore


def normed(norm: nn.Module, x: Tensor, zemb: Tensor) -> Tensor:
    """SiLU of the norm that the latent scales and shifts."""
    scale, shift = (zemb @ norm.style.weight.T + norm.style.bias).chunk(2, dim=1)  # pyright: ignore
    return F.silu(F.group_norm(x, x.shape[1] // 4, eps=1e-6) * scale[:, :, None, None] + shift[:, :, None, None])


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)  # pyright: ignore


def second_half(block: nn.Module, h: Tensor, temb: Tensor, zemb: Tensor) -> Tensor:
    h = h + (temb @ block.time.weight.T + block.time.bias)[:, :, None, None]  # pyright: ignore
    return convolved(block.conv2, normed(block.norm2, h, zemb))  # pyright: ignore


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_low_frequencies_are_the_mean_and_all_of_them_give_the_features_back() -> None:
    x, _, _ = inputs()
    ll, *high = orthonormal(x)
    low, bands = split(x)
    close(low, ll / 2)
    close(low, F.avg_pool2d(x, 2))
    close(bands, torch.cat(high, dim=1))
    close(unsplit(low, bands), x)
    close(unsplit(low, -bands), restored([ll, *(-b for b in high)]))


def test_down_block_splits_after_its_first_convolution() -> None:
    block = awakened(HaarDownBlock(8, 12, **OPTIONS))
    x, temb, zemb = inputs()
    ll, *high = orthonormal(convolved(block.conv1, normed(block.norm1, x, zemb)))  # pyright: ignore
    shortcut = convolved(block.shortcut, orthonormal(x)[0] / 2)  # pyright: ignore
    found, _, bands = block(x, temb, zemb)
    close(found, (shortcut + second_half(block, ll / 2, temb, zemb)) / math.sqrt(2))
    close(bands, torch.cat(high, dim=1))


def test_up_block_gives_both_branches_the_convolved_bands() -> None:
    block = awakened(HaarUpBlock(8, 4, **OPTIONS))
    (x, temb, zemb), given = inputs(), torch.randn(2, 12, 8, 8, dtype=torch.float64)
    kernel, bias = block.bands.weight, block.bands.bias  # pyright: ignore
    bands = [  # one group each: 4 channels to 8
        F.conv2d(given[:, 4 * k : 4 * k + 4], kernel[8 * k : 8 * k + 8], bias[8 * k : 8 * k + 8], padding=1)  # pyright: ignore
        for k in range(3)
    ]
    h = restored([2 * normed(block.norm1, x, zemb), *bands])  # pyright: ignore
    shortcut = convolved(block.shortcut, restored([2 * x, *bands]))  # pyright: ignore
    expected = (shortcut + second_half(block, convolved(block.conv1, h), temb, zemb)) / math.sqrt(2)  # pyright: ignore
    close(block(x, temb, zemb, given)[0], expected)


def test_middle_block_changes_low_frequencies_alone() -> None:
    block = awakened(HaarMiddleBlock(8, 8, **OPTIONS))
    x, temb, zemb = inputs()
    ll, *high = orthonormal(x)
    h = convolved(block.conv1, normed(block.norm1, ll / 2, zemb))  # pyright: ignore
    low = (ll / 2 + second_half(block, h, temb, zemb)) / math.sqrt(2)
    found, _ = block(x, temb, zemb)
    close(found, restored([2 * low, *high]))
    for a, b in zip(orthonormal(found)[1:], high, strict=True):
        close(a, b)


def test_input_pyramid_is_a_1x1_convolution_of_all_coefficients() -> None:
    module = awakened(HaarInput(3, 8, skip_rescale=True))
    y, h = inputs(3)[0], inputs(8, 4)[0]
    expected = (convolved(module.conv, torch.cat(orthonormal(y), dim=1) / 2) + h) / math.sqrt(2)  # pyright: ignore
    joined, pyramid = module(h, y)
    close(joined, expected)
    assert pyramid is joined


@pytest.mark.parametrize("pyramid", ["residual", "none"])
def test_each_level_of_the_decoder_gets_the_bands_of_its_mirror(pyramid: str) -> None:
    network = awakened(Generator(replace(G, progressive_input=pyramid), FORM))
    given: list[Tensor] = []
    made: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, HaarDownBlock):
            module.register_forward_hook(lambda _, inputs, output: made.append(output[2]))
        if isinstance(module, HaarUpBlock):
            module.register_forward_hook(lambda _, inputs, output: given.append(inputs[3]))
    x, z, t = torch.randn(2, 12, 16, 16).double(), torch.randn(2, 4).double(), torch.tensor([0, 3])
    assert network(x, t, z).shape == x.shape
    assert [b.shape[1:] for b in made] == [(3 * 8, 8, 8), (3 * 16, 4, 4)]
    assert all(a is b for a, b in zip(given, reversed(made), strict=True))
    assert sum(isinstance(module, HaarMiddleBlock) for module in network.modules()) == 2
    assert sum(isinstance(module, HaarInput) for module in network.modules()) == (2 if pyramid == "residual" else 0)


def test_every_parameter_learns() -> None:
    network = awakened(Generator(G, FORM))
    x, z, t = torch.randn(2, 12, 16, 16).double(), torch.randn(2, 4).double(), torch.tensor([0, 3])
    network(x, t, z).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"progressive_output": "output_skip"}, "resample is haar, which has no pyramid of images, but"),
        ({"progressive_input": "input_skip"}, "and progressive_input input_skip: set progressive_output to none"),
        ({"channel_multipliers": (1, 1, 1, 1, 1)}, r"image_size is 16, not a multiple of 2 \*\* 5 = 32: give fewer"),
    ],
)
def test_networks_without_such_blocks_and_odd_middles_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Generator(replace(G, **changes), FORM)


def test_bands_are_counted_as_three_groups() -> None:
    with torch.device("meta"):
        up, given = HaarUpBlock(8, 4, **OPTIONS), torch.empty(1, 12, 8, 8)
        x, temb, zemb = torch.empty(1, 8, 8, 8), torch.empty(1, 6), torch.empty(1, 5)
    with FlopCounterMode(display=False) as counter:
        up(x, temb, zemb, given)
    bands, pixels = 3 * 9 * 4 * 8 * 64, 256 * (9 * 8 * 8 + 9 * 8 * 8 + 8 * 8)
    linear = 5 * 16 + 5 * 16 + 6 * 8  # two norms and the time
    assert counter.get_total_flops() == 2 * (bands + pixels + linear)


def test_features_and_gradients_keep_the_layout_channels_last() -> None:
    last = torch.channels_last
    network = awakened(Generator(G, FORM)).to(memory_format=last)  # pyright: ignore[reportCallIssue]
    plain = awakened(Generator(G, FORM))
    x, z, t = torch.randn(2, 12, 16, 16).double(), torch.randn(2, 4).double(), torch.tensor([0, 3])
    maps: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, (HaarDownBlock, HaarUpBlock, HaarMiddleBlock)):
            module.register_forward_hook(lambda _, inputs, output: maps.extend(tree_leaves(output)))
            module.conv1.register_full_backward_hook(
                lambda _, of_inputs, of_outputs: maps.extend([*of_inputs, *of_outputs])
            )
    found, expected = network(x.contiguous(memory_format=last), t, z), plain(x, t, z)
    found.backward(torch.ones_like(found).contiguous(memory_format=last))
    assert len(maps) == 2 * 2 + 2 * 2 + 2 * 3 + 6 * 2
    assert all(m.is_contiguous(memory_format=last) for m in maps)
    close(found, expected)
