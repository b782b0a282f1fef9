import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.resample import (
    FirBlur,
    FirDownsample,
    FirUpsample,
    MeanDownsample,
    NearestUpsample,
    doubled_by_slices,
    downsample,
    halved_by_slices,
    upsample,
)


class CountedCalls(TorchDispatchMode):
    """Counts the calls of operators whose name contains a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word, self.calls = word, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += self.word in str(func)
        return func(*args, **(kwargs or {}))


TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
LAYERS = [FirDownsample, FirUpsample, FirBlur, MeanDownsample, NearestUpsample]


def filtered(x: Tensor, pad_before: int, pad_after: int) -> Tensor:
    """Zero-pad and filter, tap by tap, in float64."""
    B, C, H, W = x.shape
    pad = pad_before + pad_after
    padded = torch.zeros(B, C, H + pad, W + pad, dtype=torch.float64)
    padded[:, :, pad_before : pad_before + H, pad_before : pad_before + W] = x
    out = torch.zeros(B, C, H + pad - 3, W + pad - 3, dtype=torch.float64)
    for i, row_tap in enumerate(TAPS):
        for j, column_tap in enumerate(TAPS):
            out += row_tap * column_tap * padded[:, :, i : i + out.shape[2], j : j + out.shape[3]]
    return out


def with_zeros_inserted(x: Tensor) -> Tensor:
    out = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=torch.float64)
    out[:, :, ::2, ::2] = x
    return out


REFERENCES = {
    FirDownsample: lambda x: filtered(x, 1, 1)[:, :, ::2, ::2],
    FirUpsample: lambda x: 4 * filtered(with_zeros_inserted(x), 2, 1),
    FirBlur: lambda x: filtered(x, 2, 2),
    MeanDownsample: lambda x: x.double().unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5)),
    NearestUpsample: lambda x: x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_plain_float64_definition(layer: type[nn.Module], memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 8, 6).contiguous(memory_format=memory_format)
    y = layer()(x)
    # float32 rounding of at most 16 products of unit size
    torch.testing.assert_close(y.double(), REFERENCES[layer](x), atol=1e-6, rtol=0)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("layer", "by_slices"), [(FirDownsample, halved_by_slices), (FirUpsample, doubled_by_slices)])
def test_sums_of_shifted_pixels_equal_the_definition(layer: type[nn.Module], by_slices) -> None:
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(by_slices(x).double(), REFERENCES[layer](x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_is_differentiable_twice(layer: type[nn.Module]) -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    # The square gives the linear layers a second derivative.
    resample = layer().double()
    assert torch.autograd.gradcheck(lambda x: resample(x).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: resample(x).square(), x)


@pytest.mark.parametrize("layer", [FirDownsample, FirUpsample])
def test_a_second_derivative_takes_as_many_convolutions_for_many_channels_as_for_one(layer: type[nn.Module]) -> None:
    """Torch's own makes one for each channel."""

    def convolutions(num_channels: int) -> int:
        x = torch.randn(2, num_channels, 8, 8, requires_grad=True)
        with CountedCalls("convolution") as counted:
            (gradient,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
        return counted.calls

    assert convolutions(16) == convolutions(1) > 0


@pytest.mark.parametrize("layer", [FirDownsample, FirUpsample])
def test_autocast_filters_in_its_dtype_and_gives_the_gradient_in_that_of_the_input(layer: type[nn.Module]) -> None:
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer()(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_constant_stays_constant_away_from_the_border() -> None:
    ones = torch.ones(1, 1, 16, 16)
    for layer in (FirDownsample(), FirUpsample(), FirBlur()):
        inside = layer(ones)[:, :, 2:-2, 2:-2]
        assert torch.equal(inside, torch.ones_like(inside))


def test_state_dict_leaves_the_kernel_out() -> None:
    assert not FirDownsample().state_dict()


def test_names_choose_the_layers() -> None:
    assert isinstance(downsample("fir"), FirDownsample)
    assert isinstance(upsample("fir"), FirUpsample)
    assert isinstance(downsample("nearest"), MeanDownsample)
    assert isinstance(upsample("nearest"), NearestUpsample)
