"""The fused residual merge equals plain torch in float64."""

import pytest
import torch

from models.fused import merge
from models.fused.merge import fused_merge, plain_merge
from tests.models.fused.forms import assert_equal_forms, assert_equal_second_derivatives, on_each_device, some


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "BLOCK", 32)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(device, dtype) -> None:
    assert_equal_forms(fused_merge, plain_merge, [some(2, 5, 3, 4, device=device, dtype=dtype) for _ in range(2)])


@on_each_device
def test_has_a_second_derivative(device) -> None:
    branches = [some(1, 4, 2, 3, device=device, dtype=torch.float32) for _ in range(2)]
    assert_equal_second_derivatives(fused_merge, plain_merge, branches)


@on_each_device
def test_branches_of_two_layouts_and_dtypes_are_merged(device) -> None:
    a = some(2, 4, 3, 2, device=device, dtype=torch.bfloat16)
    b = torch.randn(2, 4, 3, 2, device=device, requires_grad=True)
    y = fused_merge(a, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain_merge(a, b))
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (a, b))] == [torch.bfloat16, torch.float32]


def test_has_shapes_without_values_on_the_meta_device() -> None:
    a = torch.empty(2, 8, 5, 3, device="meta", memory_format=torch.channels_last, requires_grad=True)
    assert fused_merge(a, a).shape == a.shape
