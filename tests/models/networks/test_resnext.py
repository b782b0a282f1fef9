"""The discriminator of ResNeXt blocks against its formulas in float64, and what it takes."""

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.discriminator import DiscriminatorConfig
from models.networks.build import build_discriminator
from models.networks.resnext import ResNeXtBlock, ResNeXtDiscriminator
from models.resample import BinomialDownsample
from models.shapes import ImageForm

NetworkT = TypeVar("NetworkT", bound=nn.Module)
D = DiscriminatorConfig(kind="resnext", base_channels=2, time_embedding_dim=4)
"""Width 24 up to 32 px: three groups of 16 in the middle of a block."""


def awakened(network: NetworkT) -> NetworkT:
    """In float64, without zeros that would hide errors."""
    torch.manual_seed(1)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network.double()


def inputs(size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x_tm1, x_t = torch.randn(2, 4, channels, size, size, dtype=torch.float64).unbind()
    return x_tm1, x_t, torch.arange(4)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def convolved(x: np.ndarray, kernel: np.ndarray, *, padding: int = 0, groups: int = 1, stride: int = 1) -> np.ndarray:
    """Sum over the taps of a kernel [C_out, C_in / groups, k, k]."""
    size, per_group = kernel.shape[-1], kernel.shape[1]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    out_size, out_width = (x.shape[2] - size) // stride + 1, kernel.shape[0] // groups
    y = np.zeros((x.shape[0], kernel.shape[0], out_size, out_size))
    for g in range(groups):
        of_group = x[:, g * per_group : (g + 1) * per_group]
        out = slice(g * out_width, (g + 1) * out_width)
        for i in range(size):
            for j in range(size):
                seen = of_group[:, :, i : i + stride * out_size : stride, j : j + stride * out_size : stride]
                y[:, out] += np.einsum("oc,bchw->bohw", kernel[out, :, i, j], seen)
    return y


def block(x: np.ndarray, temb: np.ndarray, w: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    """x + W3 lrelu(G(lrelu(W1 x + b1 + time)) + b2), where G has groups of 16 channels."""
    time = temb @ w[f"{prefix}time.weight"].T + w[f"{prefix}time.bias"]
    h = convolved(x, w[f"{prefix}conv1.weight"]) + (w[f"{prefix}conv1.bias"] + time)[:, :, None, None]
    kernel = w[f"{prefix}conv2.weight"]
    h = convolved(leaky(h), kernel, padding=1, groups=len(kernel) // 16) + w[f"{prefix}conv2.bias"][:, None, None]
    return x + convolved(leaky(h), w[f"{prefix}conv3.weight"])


def halved(x: np.ndarray) -> np.ndarray:
    """[1, 2, 1] / 4 in both directions at every second pixel, beyond the border 0."""
    taps = np.outer([1, 2, 1], [1, 2, 1]) / 16
    kernel = np.broadcast_to(taps, (x.shape[1], 1, 3, 3))
    return convolved(x, kernel, padding=1, groups=x.shape[1], stride=2)


def test_block_and_resampling_equal_their_formulas() -> None:
    network = awakened(ResNeXtBlock(24, time_channels=4, num_blocks=4))
    x, temb = torch.randn(2, 24, 6, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    np.testing.assert_allclose(
        network(x, temb).detach().numpy(), block(x.numpy(), temb.numpy(), weights(network)), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(BinomialDownsample().double()(x).numpy(), halved(x.numpy()), atol=1e-14)


@pytest.mark.parametrize(
    ("size", "base", "widths"), [(4, 2, [24]), (16, 2, [24, 24, 24]), (64, 4, [24, 48, 48, 48, 48])]
)
def test_logits_equal_the_formulas_of_the_whole_network(size: int, base: int, widths: list[int]) -> None:
    network = awakened(build_discriminator(replace(D, base_channels=base), ImageForm(size, 3, num_classes=5)))
    assert isinstance(network, ResNeXtDiscriminator)
    x_tm1, x_t, t = inputs(size)
    label, w = torch.tensor([0, 5, 2, 2]), weights(network)
    temb = network.time_embedding(t).detach().numpy()
    h = convolved(np.concatenate([x_tm1.numpy(), x_t.numpy()], 1), w["conv_in.weight"])
    h = h + w["conv_in.bias"][:, None, None]
    for stage, width in enumerate(widths):
        if stage:
            h = halved(h)
        if stage and width != widths[stage - 1]:
            h = convolved(h, w[f"transitions.{stage}.weight"])
        assert h.shape[1:] == (width, size >> stage, size >> stage)
        for number in (0, 1):
            h = block(h, temb, w, f"stages.{stage}.{number}.")
    h = convolved(h, w["conv_out.weight"], groups=widths[-1])[:, :, 0, 0]
    expected = h @ w["head.weight"][0] + w["head.bias"] + (w["label.embedding.weight"][label.numpy()] * h).sum(1)
    np.testing.assert_allclose(network(x_tm1, x_t, t, label).detach().numpy(), expected, rtol=1e-10)


def test_first_layers_start_as_in_r3gan_and_blocks_as_the_identity() -> None:
    torch.manual_seed(0)
    network = ResNeXtDiscriminator(replace(D, base_channels=16), ImageForm(16, 3))
    gain = math.sqrt(2 / 1.04) * 6**-0.25  # six blocks
    for stage in network.stages:
        for made in stage:  # pyright: ignore[reportGeneralTypeIssues]
            assert made.conv1.weight.std().item() == pytest.approx(gain / math.sqrt(192), rel=0.02)
            assert made.conv2.weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), rel=0.02)
            assert not made.conv3.weight.any() and not made.conv1.bias.any()
    assert network.conv_in.weight.std().item() == pytest.approx(1 / math.sqrt(6), rel=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_r1_has_the_gradient_of_its_finite_difference(memory_format: torch.memory_format) -> None:
    network = awakened(ResNeXtDiscriminator(D, ImageForm(8, 3)))
    network.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x_tm1, x_t, t = inputs()
    x_tm1, x_t = (x.contiguous(memory_format=memory_format) for x in (x_tm1, x_t))

    def r1() -> Tensor:
        (gradient,) = torch.autograd.grad(network(x_tm1, x_t, t).sum(), x_tm1, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    x_tm1.requires_grad_()
    names = ("stages.0.0.conv2.weight", "stages.1.1.conv1.weight", "conv_out.weight")
    parameters = [network.get_parameter(name) for name in names]
    for parameter, gradient in zip(parameters, torch.autograd.grad(r1(), parameters), strict=True):
        direction, values = torch.randn_like(parameter), []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            values.append(r1().item())
            parameter.data -= sign * 1e-6 * direction
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_one_that_sees_the_marginal_is_blind_to_x_t_and_predicts() -> None:
    network = awakened(ResNeXtDiscriminator(replace(D, sees="marginal", predicts=("x0", "x_t")), ImageForm(16, 3)))
    x_tm1, x_t, t = inputs(16)
    logits, predictions = network(x_tm1, x_t, t, predicting=True)
    assert torch.equal(logits, network(x_tm1, -x_t, t))
    assert [x.shape for x in predictions] == 2 * [x_tm1.shape]
    torch.stack([x.square().sum() for x in predictions]).sum().backward()
    without = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"conv_out", "head"}


@pytest.mark.parametrize(
    ("size", "base", "said"),
    [
        (28, 2, r"image_size is 28, but the resnext discriminator halves it to 4 pixels.*choose another"),
        (2, 2, "image_size is 2, but the resnext discriminator"),
        (16, 3, "base_channels is 3, but the resnext discriminator of 16 pixels needs a multiple of 2,"),
        (256, 24, "base_channels is 24, but the resnext discriminator of 256 pixels needs a multiple of 16,"),
    ],
)
def test_a_size_that_does_not_end_at_4_px_and_widths_without_whole_groups_are_refused(size, base, said) -> None:
    with pytest.raises(ValueError, match=said):
        ResNeXtDiscriminator(replace(D, base_channels=base), ImageForm(size, 3))


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_the_multiple_that_is_asked_for_is_enough(size: int) -> None:
    with torch.device("meta"):
        ResNeXtDiscriminator(replace(D, base_channels=max(size, 32) // 16), ImageForm(size, 3))
