from collections.abc import Iterator

import pytest
import torch

from trainer.engine.precision import allow_tf32, best_precision


@pytest.fixture(autouse=True)
def formats_are_put_back() -> Iterator[None]:
    yield
    allow_tf32(False)


def test_a_cpu_computes_in_float32():
    assert best_precision(torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((10, 0), "bf16")],
)
def test_a_gpu_computes_in_bf16_from_capability_8(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert best_precision(torch.device("cuda", 0)) == precision


@pytest.mark.parametrize("allowed", [True, False, True])
def test_tf32_is_set_for_every_product_and_torch_can_read_both_of_its_interfaces(allowed):
    allow_tf32(allowed)
    name = "tf32" if allowed else "ieee"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    assert (cudnn.fp32_precision, cudnn.conv.fp32_precision, matmul.fp32_precision) == (name, name, name)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (allowed, allowed)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_products_on_the_cpu_do_not_change():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a @ b
    allow_tf32(True)
    assert torch.equal(a @ b, exact)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # pyright: ignore[reportAttributeAccessIssue]
