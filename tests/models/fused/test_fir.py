"""Fused FIR filters equal convolutions in float64, and so do their first and second derivatives."""

import pytest
import torch

from models.fused import fir
from models.fused.fir import fused_double, fused_filter, plain_double, plain_filter
from tests.models.fused.forms import assert_equal_forms, assert_equal_second_derivatives, on_each_device, some

FORMS = {
    "halving": (lambda x: fused_filter(x, 2, 1, 1.0), lambda x: plain_filter(x, 2, 1, 1.0)),
    "blur": (lambda x: fused_filter(x, 1, 2, 1.0), lambda x: plain_filter(x, 1, 2, 1.0)),
    "doubling": (lambda x: fused_double(x, 4.0), lambda x: plain_double(x, 4.0)),
}


SUM = (lambda x, more: fused_double(x, 4.0, more), lambda x, more: plain_double(x, 4.0, more))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fir, "TILE", 32)


@on_each_device
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3, 2, 4), torch.float32), ((1, 8, 2, 4), torch.bfloat16), ((1, 1, 2, 2), torch.float32)]
)
@pytest.mark.parametrize("name", FORMS)
def test_equals_float64(device, name, shape, dtype) -> None:
    assert_equal_forms(*FORMS[name], [some(*shape, device=device, dtype=dtype)])


@on_each_device
@pytest.mark.parametrize("name", ["blur", "doubling"])
def test_odd_sizes(device, name) -> None:
    assert_equal_forms(*FORMS[name], [some(1, 4, 3, 1, device=device, dtype=torch.float32)])


@on_each_device
@pytest.mark.parametrize("name", FORMS)
def test_has_a_second_derivative(device, name) -> None:
    assert_equal_second_derivatives(*FORMS[name], [some(1, 2, 4, 2, device=device, dtype=torch.float32)])


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doubling_and_a_sum_in_one_equal_float64(device, dtype) -> None:
    x, more = (some(2, 3, *sides, device=device, dtype=dtype) for sides in ((3, 2), (6, 4)))
    assert_equal_forms(*SUM, [x, more])


@on_each_device
def test_doubling_and_a_sum_have_a_second_derivative(device) -> None:
    tensors = [some(1, 2, *sides, device=device, dtype=torch.float32) for sides in ((2, 1), (4, 2))]
    assert_equal_second_derivatives(*SUM, tensors)


@pytest.mark.parametrize(("name", "sides"), [("halving", (4, 3)), ("blur", (9, 7)), ("doubling", (16, 12))])
def test_has_shapes_without_values_on_the_meta_device(name, sides) -> None:
    x = torch.empty(2, 5, 8, 6, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    y = FORMS[name][0](x.requires_grad_())
    assert (y.shape, y.dtype) == ((2, 5, *sides), x.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert grad.shape == x.shape
