from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trainer.algorithm.methods import make_method
from trainer.config.io import load_config
from trainer.plan.bytes_moved import ByteCounter
from trainer.plan.cuda_autocast import IN_BF16, IN_FP32, TO_FP32, TO_WIDEST, CudaAutocast
from trainer.plan.on_meta import META, networks_on_meta

LISTED = IN_BF16 | IN_FP32 | TO_FP32 | TO_WIDEST
REGISTERED = set(torch._C._dispatch_get_all_op_names())
WITHIN = {"square": "pow", "interpolate": "upsample_nearest2d"}
"""The operators within functions that have no autocast themselves."""


def autocasts(name: str) -> bool:
    """Whether torch registers a cast on GPUs for an operator; builds for the CPU have these registrations as well."""
    operator = WITHIN.get(name, name.strip("_").removeprefix("r") if "__" in name else name)
    if not hasattr(torch.ops.aten, operator):
        return False
    packet = getattr(torch.ops.aten, operator)
    full = packet._qualified_op_name
    names = {full if overload == "default" else f"{full}.{overload}" for overload in packet.overloads()}
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(one, "AutocastCUDA") for one in names & REGISTERED)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_each_listed_function_is_cast_on_a_gpu(name):
    assert autocasts(name)


@pytest.mark.parametrize("name", ["silu", "leaky_relu", "add", "mul", "tanh", "mean", "var", "cat", "sin", "sqrt"])
def test_what_is_not_listed_runs_in_the_type_of_its_inputs(name):
    assert not autocasts(name)


class Called(TorchFunctionMode):
    """Names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", ["digits", "gaussians25"])
def test_every_function_of_the_networks_that_a_gpu_casts_is_listed(config):
    chosen = load_config(config)
    networks, form = networks_on_meta(chosen, make_method(chosen.training, chosen.generator)), chosen.image_form
    x, t = torch.empty(8, *form.shape, device=META), torch.zeros(8, dtype=torch.int64, device=META)
    label = torch.zeros(8, dtype=torch.int64, device=META) if form.num_classes else None
    dim = chosen.generator.latent_dim
    with Called() as called:
        networks["g"](x, t, torch.empty(8, dim, device=META), label)
        networks["d"](x, x, t, label)
    assert {"linear"} <= called.names
    assert {name for name in called.names if autocasts(name)} <= LISTED


def test_products_are_in_bf16_and_norms_and_sums_in_fp32():
    conv, norm = nn.Conv2d(4, 8, 3, device=META), nn.GroupNorm(2, 8, device=META)
    with CudaAutocast():
        h = conv(torch.empty(2, 4, 6, 6, device=META))
        assert (h.dtype, F.silu(h).dtype, norm(h).dtype, h.sum(dim=1).dtype, (h + h).dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
            torch.float32,
            torch.bfloat16,
        )
        assert h.square().dtype == torch.float32
        assert torch.addcmul(h, h, norm(h)).dtype == torch.float32
    assert conv(torch.empty(2, 4, 6, 6, device=META)).dtype == torch.float32


def test_gradients_come_back_in_the_type_of_the_parameters():
    linear = nn.Linear(4, 4, device=META)
    with CudaAutocast():
        linear(torch.empty(2, 4, device=META)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_a_parameter_is_cast_once_in_a_context():
    linear, x = nn.Linear(4, 4, device=META), torch.empty(2, 4, device=META, dtype=torch.bfloat16)
    with ByteCounter() as counter, CudaAutocast():
        linear(x)
        linear(x)
    assert counter.traffic["cast"].num_operations == 2  # weight and bias
