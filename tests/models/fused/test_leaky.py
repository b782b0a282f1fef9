"""Bias and leaky ReLU in one equal plain torch in float64, and so do their first and second derivatives."""

import pytest
import torch

from models.fused import leaky
from models.fused.leaky import fused_leaky_relu, plain_leaky_relu
from tests.models.fused.forms import assert_equal_forms, assert_equal_second_derivatives, on_each_device, some

FORMS = (lambda x, bias: fused_leaky_relu(x, bias, 0.2), lambda x, bias: plain_leaky_relu(x, bias, 0.2))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaky, "TILE", 32)
    monkeypatch.setattr(leaky, "BLOCK", 64)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_biases"), [((2, 8, 4, 3), 2), ((1, 5, 3, 3), 1), ((3, 12, 1, 2), 1)])
def test_equals_float64(device, dtype, shape, num_biases) -> None:
    x, bias = some(*shape, device=device, dtype=dtype), some(num_biases, shape[1], device=device, dtype=dtype)
    if dtype == torch.bfloat16:  # sums whose sign does not depend on rounding
        x, bias = ((8 * t).round() / 8 + offset for t, offset in ((x, 0.0625), (bias, 0)))
    assert_equal_forms(*FORMS, (x, bias))


@on_each_device
@pytest.mark.parametrize("num_biases", [1, 2])
def test_has_a_second_derivative(device, num_biases) -> None:
    tensors = [some(*shape, device=device, dtype=torch.float32) for shape in ((2, 6, 3, 2), (num_biases, 6))]
    assert_equal_second_derivatives(*FORMS, tensors)


@on_each_device
def test_at_zero_the_slope_is_that_of_torch(device) -> None:
    x, bias = some(1, 4, 2, 2, device=device, dtype=torch.float32), torch.zeros(1, 4, device=device)
    zero = (0 * x.detach()).requires_grad_()
    grads = [torch.autograd.grad(form(zero, bias).sum(), zero)[0] for form in FORMS]
    assert torch.equal(*grads)


def test_has_shapes_without_values_on_the_meta_device() -> None:
    x = torch.empty(2, 8, 5, 3, device="meta", memory_format=torch.channels_last, requires_grad=True)
    bias = torch.empty(1, 8, device="meta", requires_grad=True)
    y = fused_leaky_relu(x, bias, 0.2)
    assert [g.shape for g in torch.autograd.grad(y, (x, bias), torch.empty_like(y))] == [x.shape, bias.shape]
