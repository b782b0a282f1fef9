"""The meta device with a memory gives what the meta device gives."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.plan.remembered import RememberedResults

META = torch.device("meta")


class Calls(TorchDispatchMode):
    """Counts what reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def form(value: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves]


OPERATIONS = {
    "a product that changes the type": lambda: meta(2, 3, dtype=torch.bfloat16) * meta(3),
    "an integer and a real number": lambda: (meta(3, dtype=torch.int64) * 2, meta(3, dtype=torch.int64) * 2.0),
    "a bool and an integer": lambda: (meta(3, dtype=torch.bool) + 1, meta(3, dtype=torch.bool) + True),
    "a convolution in channels_last": lambda: torch.nn.functional.conv2d(
        meta(2, 4, 8, 8).to(memory_format=torch.channels_last), meta(6, 4, 3, 3), padding=1
    ),
    "results of several tensors": lambda: torch.ops.aten.native_group_norm(meta(2, 4, 8), None, None, 2, 4, 8, 2, 1e-5),
    "a list of tensors": lambda: torch.cat([meta(2, 3), meta(4, 3)]),
    "a transposed argument": lambda: (meta(2, 3) + 1, meta(3, 2).T + 1),
    "a tensor of the CPU": lambda: torch.ones(2) + 1,
    "a view": lambda: meta(4, 6)[1:, ::2],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_form_that_the_device_gives_them_the_second_time_too(name: str) -> None:
    plain = form(OPERATIONS[name]())
    with RememberedResults():
        assert form(OPERATIONS[name]()) == plain
        assert form(OPERATIONS[name]()) == plain


def test_the_second_time_nothing_is_computed() -> None:
    a, b = meta(5, 7, 3), meta(5, 3, 11)
    with Calls() as calls, RememberedResults():
        first, second = a @ b, a @ b
    assert calls.names.count("bmm") == 1
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_results_in_place_and_views_share_their_memory_as_ever() -> None:
    a = meta(4, 4)
    with RememberedResults():
        for _ in range(2):
            assert a.add_(1) is a
            assert a[1:].untyped_storage()._cdata == a.untyped_storage()._cdata


def test_gradients_pass_through_remembered_results() -> None:
    weight = torch.nn.Parameter(meta(3, 4))
    with RememberedResults():
        for _ in range(2):
            torch.nn.functional.silu(meta(2, 4) @ weight.T).sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (3, 4)
