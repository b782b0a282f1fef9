"""Group norm with scale, shift and SiLU in one equals plain torch in float64, whatever the shape."""

import pytest
import torch
from torch import Tensor

from models.fused import norm
from models.fused.norm import fused_group_norm, plain_group_norm
from tests.models.fused.forms import (
    assert_close,
    assert_equal_forms,
    assert_equal_second_derivatives,
    on_each_device,
    some,
)

pytestmark = [
    # numpy warns where the interpreter computes exp(-u) of what is masked out
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits and tiles per sample, although the maps are small."""
    monkeypatch.setattr(norm, "TILE", 64)
    monkeypatch.setattr(norm, "ELEMENTS", 128)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_groups", "num_styles", "silu"),
    [
        ((2, 8, 4, 4), 2, 2, True),
        ((1, 12, 5, 3), 3, 1, True),  # one sample, odd sizes, channels not a power of two
        ((3, 24, 3, 1), 2, 1, False),  # one style for all samples
        ((2, 4, 1, 1), 1, 2, True),
        ((1, 96, 1, 3), 3, 1, True),  # a tile of a pixel
    ],
)
def test_equals_float64(device, dtype, shape, num_groups, num_styles, silu) -> None:
    x = some(*shape, device=device, dtype=dtype)
    style = some(num_styles, 2 * shape[1], device=device, dtype=dtype)
    options = (num_groups, 1e-6, silu)
    assert_equal_forms(
        lambda x, style: fused_group_norm(x, style, *options),
        lambda x, style: plain_group_norm(x, style, *options),
        (x, style),
    )


@on_each_device
@pytest.mark.parametrize(("mean", "tolerance"), [(100.0, 1e-5), (1e4, 1e-3)])
def test_a_large_mean_cancels_nothing(device, mean, tolerance) -> None:
    x = some(2, 8, 6, 5, device=device, dtype=torch.float32, mean=mean)
    style = some(2, 16, device=device, dtype=torch.float32)
    y = fused_group_norm(x, style, 2, 1e-6, True)
    # float32 keeps the inputs' differences to 1e-7 of the mean
    assert_close(y, plain_group_norm(x.double(), style.double(), 2, 1e-6, True), tolerance)


@on_each_device
def test_one_outlier_among_equal_pixels_keeps_its_distance(device) -> None:
    x = torch.full((1, 4, 6, 6), 100.0, device=device).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = 1e4
    style = some(1, 8, device=device, dtype=torch.float32)
    y = fused_group_norm(x, style, 1, 1e-6, False)
    assert_close(y, plain_group_norm(x.double(), style.double(), 1, 1e-6, False), 1e-5)


@on_each_device
def test_mixed_dtypes_come_back_as_they_were_given(device) -> None:
    x = some(2, 8, 3, 3, device=device, dtype=torch.bfloat16)
    style = some(1, 16, device=device, dtype=torch.float32)
    y = fused_group_norm(x, style, 2, 1e-6, True)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, (x, style), torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


@on_each_device
def test_gradient_in_another_layout_is_understood(device) -> None:
    x = some(2, 8, 3, 4, device=device, dtype=torch.float32)
    style = some(2, 16, device=device, dtype=torch.float32)
    grad = torch.randn(2, 8, 3, 4, device=device)
    grads: list[Tensor] = []
    for laid_out in (grad, grad.contiguous(memory_format=torch.channels_last)):
        grads += torch.autograd.grad(fused_group_norm(x, style, 2, 1e-6, True), x, laid_out)
    assert torch.equal(*grads)


@on_each_device
def test_has_a_second_derivative(device) -> None:
    x = some(2, 8, 3, 3, device=device, dtype=torch.float32)
    style = some(2, 16, device=device, dtype=torch.float32)
    assert_equal_second_derivatives(
        lambda x, style: fused_group_norm(x, style, 2, 1e-6, True),
        lambda x, style: plain_group_norm(x, style, 2, 1e-6, True),
        (x, style),
    )


@pytest.mark.slow
@on_each_device
def test_is_one_operation_for_tools_that_watch(device) -> None:
    x = some(1, 8, 2, 1, device=device, dtype=torch.float32)
    style = some(1, 16, device=device, dtype=torch.float32)
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(norm._forward, (x, style, 2, 1e-6, True), test_utils=kinds)


def test_has_shapes_without_values_on_the_meta_device() -> None:
    x = torch.empty(2, 8, 5, 3, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    style = torch.empty(2, 16, device="meta", requires_grad=True)
    y = fused_group_norm(x.requires_grad_(), style, 2, 1e-6, True)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    grads = torch.autograd.grad(y, (x, style), torch.empty_like(y))
    assert [g.shape for g in grads] == [x.shape, style.shape]
