"""Group norm in one pass equals plain torch in float64, with all that it takes in and hands on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.fused import norm, whole_norm
from models.fused.norm import fused_group_norm
from models.fused.whole_norm import fused_norm_of, plain_norm_of, slab_of
from tests.models.fused.forms import (
    assert_close,
    assert_equal_forms,
    assert_equal_second_derivatives,
    needs_interpreter,
    on_each_device,
    some,
)
from trainer.plan.bytes_moved import ByteCounter

pytestmark = [
    # numpy warns where the interpreter computes exp(-u) of what is masked out
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def narrow_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per sample, although there are few channels."""
    monkeypatch.setattr(whole_norm, "MAX_CHANNELS", 8)
    monkeypatch.setattr(whole_norm, "SECTOR_CHANNELS", 4)


def given(
    channels: tuple[int, int], sides: tuple[int, int], rows: tuple[int, int], device: str, dtype: torch.dtype
) -> Any:
    """Both parts of the features, the shift and the style; what has no channels or rows is None."""
    B, C = 3, sum(channels)
    a, b = (some(B, c, *sides, device=device, dtype=dtype) if c else None for c in channels)
    shift, style = (
        some(n, k * C, device=device, dtype=dtype) if n else None for n, k in zip(rows, (1, 2), strict=True)
    )
    return a, b, shift, style


CASES = [
    ((8, 0), (4, 4), (0, 1), 2, True),
    ((12, 0), (5, 3), (3, 3), 3, True),  # odd sizes, groups that are no power of two
    ((16, 8), (3, 1), (0, 3), 2, False),  # the seam is within a group
    ((5, 7), (2, 2), (1, 1), 3, True),  # one row for all samples
]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "sides", "rows", "num_groups", "silu"), CASES)
def test_equals_float64(device, dtype, channels, sides, rows, num_groups, silu) -> None:
    tensors = given(channels, sides, rows, device, dtype)
    there = [t for t in tensors if t is not None]
    # Signs, which round nothing in bfloat16.
    weights = [torch.randn(3, sum(channels), *sides, device=device).sign() for _ in range(2)]

    def of(form):
        def run(*given: Tensor) -> Tensor:
            rest = iter(given)
            y, *same = form(*(t if t is None else next(rest) for t in tensors), num_groups, 1e-6, silu)
            # The features are used again, twice.
            for x, weight in zip(same, weights, strict=True):
                y = y + x * weight.to(x.dtype)
            return y

        return run

    assert_equal_forms(of(fused_norm_of), of(plain_norm_of), there)


@on_each_device
def test_a_large_mean_cancels_nothing(device) -> None:
    x = some(2, 8, 6, 5, device=device, dtype=torch.float32, mean=1e4)
    style = some(2, 16, device=device, dtype=torch.float32)
    y, *_ = fused_norm_of(x, None, None, style, 2, 1e-6, True)
    # float32 keeps the inputs' differences to 1e-7 of the mean
    assert_close(y, plain_norm_of(x.double(), None, None, style.double(), 2, 1e-6, True)[0], 1e-3)


@on_each_device
def test_has_a_second_derivative(device) -> None:
    a, b, _, style = given((6, 2), (3, 3), (0, 3), device, torch.float32)

    def of(form):
        def run(a: Tensor, b: Tensor, style: Tensor) -> Tensor:
            y, same, again = form(a, b, None, style, 2, 1e-6, True)
            return y + same * 0.5 + again

        return run

    assert_equal_second_derivatives(of(fused_norm_of), of(plain_norm_of), (a, b, style))


@on_each_device
def test_gradients_of_what_is_handed_on_reach_the_parts_without_the_norm(device) -> None:
    a, b, shift, style = given((6, 2), (3, 3), (3, 1), device, torch.float32)
    _, same, again = fused_norm_of(a, b, shift, style, 2, 1e-6, True)
    of_a, of_b, of_shift = torch.autograd.grad((same + 2 * again).sum(), (a, b, shift), allow_unused=True)
    assert of_shift is None
    assert torch.equal(of_a, 3 * torch.ones_like(a))
    assert torch.equal(of_b, 3 * torch.ones_like(b))


@pytest.mark.parametrize(
    ("side", "num_channels", "slab"),
    [(32, 128, 16), (32, 384, 12), (32, 512, 16), (16, 256, 64), (4, 512, 64), (64, 128, None), (4, 8, 8)],
)
def test_programs_hold_whole_groups_and_read_whole_sectors(monkeypatch, side, num_channels, slab) -> None:
    monkeypatch.undo()
    assert slab_of(side**2, num_channels, min(num_channels // 4, 32)) == slab


def test_has_shapes_without_values_on_the_meta_device() -> None:
    a, b = (
        torch.empty(2, c, 5, 3, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last) for c in (6, 2)
    )
    shift, style = torch.empty(2, 8, device="meta"), torch.empty(1, 16, device="meta")
    inputs = [t.requires_grad_() for t in (a, b, shift, style)]
    y, x, _ = fused_norm_of(a, b, shift, style, 2, 1e-6, True)
    assert (y.shape, y.dtype) == (x.shape, x.dtype) == ((2, 8, 5, 3), a.dtype)
    grads = torch.autograd.grad((y, x), inputs, (torch.empty_like(y), torch.empty_like(x)))
    assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.fixture
def moved_by_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes that the interpreter has loaded and stored, in all elements of features: of bfloat16."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def loading(self, ptrs, mask, *rest):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        moved["read"] += 2 * int(mask.data.sum()) if size == 2 else 0
        return load(self, ptrs, mask, *rest)

    def storing(self, ptrs, value, mask, *rest):
        size = value.dtype.scalar.primitive_bitwidth // 8
        moved["written"] += 2 * int(mask.data.sum()) if size == 2 else 0
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
    return moved


@needs_interpreter
@pytest.mark.parametrize("name", ["in one pass", "joined", "in several passes"])
def test_kernels_load_and_store_the_bytes_that_are_counted(monkeypatch, moved_by_kernels, name) -> None:
    monkeypatch.setattr(norm, "TILE", 64)
    monkeypatch.setattr(norm, "ELEMENTS", 128)
    joins = name == "joined"
    a, b, _, _ = given((6, 2) if joins else (8, 0), (4, 4), (0, 0), "cpu", torch.bfloat16)
    style = some(3, 16, device="cpu", dtype=torch.float32)
    small = 4 * 3 * (16 + 2 * 2)  # bytes of styles and statistics, which are float32
    with ByteCounter() as counter:
        if name == "in several passes":
            results = [fused_group_norm(a, style, 2, 1e-6, True)]
        else:
            results = list(fused_norm_of(a, b, None, style, 2, 1e-6, True))
        grads = [torch.randn(y.shape, dtype=y.dtype) for y in results]
        grads = [grad.contiguous(memory_format=torch.channels_last) for grad in grads]
        of_inputs = [t for t in (a, b, style) if t is not None]
        moved_by_autograd = counter.traffic["fused"]
        torch.autograd.grad(results, of_inputs, grads)
    read, written = moved_by_autograd.read, moved_by_autograd.written
    # Forward reads the style and writes the statistics, backward reads both and writes the style's gradient.
    read -= 2 * 4 * 3 * 16 + small - 4 * 3 * 16
    written -= small
    assert (moved_by_kernels["read"], moved_by_kernels["written"]) == (read, written)
    features, first, again = 3 * 8 * 16 * 2, 1 + joins, len(results) - 1
    rereads = 0 if again else 3
    assert read == features * (1 + 2 + again + rereads)
    assert written == features * (first + 1)
