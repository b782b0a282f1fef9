from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.plan.bytes_moved import ByteCounter, Kind, Moved, total_bytes, weighted

META = torch.device("meta")
N = 2 * 4 * 6 * 6


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape or (2, 4, 6, 6), dtype=dtype, device=META)


@torch.library.custom_op("ddgan_tests::twice_and_sum", mutates_args=())
def twice_and_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """An operator of several kernels."""
    return x * 2, x.sum()


@twice_and_sum.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


X, Y, LOW = made(), made(), made(dtype=torch.bfloat16)
WEIGHT, FILTER = made(8, 4, 3, 3), made(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("run", "kind", "read", "written"),
    [
        (lambda: X + Y, "elementwise", 8 * N, 4 * N),
        (lambda: X + X, "elementwise", 4 * N, 4 * N),
        (lambda: X.add_(Y), "elementwise", 8 * N, 4 * N),
        (lambda: LOW * 0.5, "elementwise", 2 * N, 2 * N),
        (lambda: X + made(1, 4, 1, 1).expand(2, 4, 6, 6), "elementwise", 4 * N + 16, 4 * N),
        (lambda: torch.add(X, Y, out=made()), "elementwise", 8 * N, 4 * N),
        (lambda: X.copy_(Y), "copy", 4 * N, 4 * N),
        (lambda: X.clone(), "copy", 4 * N, 4 * N),
        (lambda: X.contiguous(memory_format=torch.channels_last), "copy", 4 * N, 4 * N),
        (lambda: torch.cat([X, Y]), "copy", 8 * N, 8 * N),
        (lambda: X.to(torch.bfloat16), "cast", 4 * N, 2 * N),
        (lambda: X.zero_(), "other", 0, 4 * N),
        (lambda: torch.ones_like(X), "other", 0, 4 * N),
        (lambda: X.sum(), "other", 4 * N, 4),
        (lambda: F.silu(X), "activation", 4 * N, 4 * N),
        (lambda: torch.native_group_norm(X, None, None, 2, 4, 36, 2, 1e-6), "norm", 4 * N, 4 * N + 2 * 4 * 2 * 2),
        (lambda: F.conv2d(X, WEIGHT, padding=1), "convolution", 4 * N + 4 * 8 * 4 * 9, 8 * N),
        (lambda: F.conv2d(X, FILTER, padding=1, groups=4), "fir", 4 * N + 4 * 4 * 9, 4 * N),
        (lambda: made(3, 5) @ made(5, 7), "matmul", 4 * (15 + 35), 4 * 21),
        (lambda: twice_and_sum(X), "fused", 4 * N, 4 * N + 4),
    ],
)
def test_operation_reads_its_inputs_once_and_writes_its_outputs_once(
    run: Callable[[], Any], kind: str, read: int, written: int
) -> None:
    with ByteCounter() as counter:
        run()
    assert {name: (m.read, m.written) for name, m in counter.traffic.items() if m.total} == {kind: (read, written)}
    assert sum(moved.num_operations for moved in counter.traffic.values()) == 1


@pytest.mark.parametrize(
    "run",
    [
        lambda: X.view(-1),
        lambda: X.transpose(0, 1)[:, 1:],
        lambda: X.detach(),
        lambda: X.expand(3, 2, 4, 6, 6),
        lambda: torch.empty_like(X),
        lambda: X.to(torch.float32),
        lambda: X.contiguous(),
    ],
)
def test_views_and_allocations_move_nothing(run: Callable[[], Any]) -> None:
    with ByteCounter() as counter:
        run()
    assert total_bytes(counter.traffic) == 0


def test_backward_of_a_convolution_reads_gradient_input_and_weight_and_writes_both_gradients() -> None:
    x, weight = made().requires_grad_(), made(8, 4, 3, 3).requires_grad_()
    y = F.conv2d(x, weight, padding=1)
    with ByteCounter() as counter:
        y.backward(made(2, 8, 6, 6))
    moved, size = counter.traffic["convolution"], 4 * 8 * 4 * 9
    assert (moved.read, moved.written) == (8 * N + 4 * N + size, 4 * N + size)
    assert moved.flops == {torch.float32: 2 * 2 * (2 * 8 * 36) * (4 * 9)}


def test_convolutions_keep_channels_last_as_on_a_gpu() -> None:
    x, weight = (tensor.to(memory_format=torch.channels_last).requires_grad_() for tensor in (made(), WEIGHT))
    with ByteCounter():
        y = F.conv2d(x, weight, padding=1)
        y.sum().backward()
    assert x.grad is not None
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, x.grad))
    with ByteCounter():
        assert F.conv2d(X, WEIGHT).is_contiguous()


def test_everything_is_of_one_kind_inside_all_as() -> None:
    with ByteCounter() as counter, counter.all_as("average"):
        X.lerp_(Y, 0.5)
        X.clone()
    assert {name for name, moved in counter.traffic.items() if moved.total} == {"average"}


def test_traffics_are_added_with_their_weights() -> None:
    one: dict[Kind, Moved] = {"cast": Moved(10, 20, 1)}
    one["cast"].flops[torch.float32] = 4
    total = weighted((2, one), (-1, one), (0.5, {"copy": Moved(2, 2, 1)}))
    assert (total["cast"].read, total["cast"].written, total["cast"].flops[torch.float32]) == (10, 20, 4)
    assert total_bytes(total) == 32
