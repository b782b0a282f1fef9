"""The fused form is used where it is wanted and right; everywhere else, plain torch is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.blocks import Attention, ResidualBlock
from models.discriminator import DownBlock
from models.fused.operator import Operator, can_fuse, fuse, fused
from models.resample import FirDownsample, FirUpsample
from tests.models.fused.forms import needs_interpreter
from trainer.algorithm.penalties import gradient_penalty


def features(dtype: torch.dtype = torch.float32, memory_format=torch.channels_last) -> Tensor:
    return torch.randn(2, 8, 4, 6).to(dtype).contiguous(memory_format=memory_format)


def test_a_cpu_computes_plainly_unless_told_otherwise() -> None:
    assert not can_fuse(features())
    with fused("everywhere"):
        assert can_fuse(features())
        with fused("nowhere"):
            assert not can_fuse(features())
    assert not can_fuse(features())


def test_the_choice_stays_until_the_next() -> None:
    fuse("everywhere")
    assert can_fuse(features())
    fuse("gpu")
    assert not can_fuse(features())


@pytest.mark.parametrize(
    "x",
    [
        features(torch.float64),
        features(torch.float16),
        features(memory_format=torch.contiguous_format),
        features()[:, :, ::2],
        torch.randn(2, 8),
        torch.randn(0, 8, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(1, 5000, 1, 1),
        # offsets within a sample must fit into 32 bits
        torch.empty(1, 64, 2**13, 2**13, device="meta", memory_format=torch.channels_last),
    ],
    ids=["float64", "float16", "contiguous", "sliced", "vectors", "empty", "wide", "huge"],
)
def test_what_has_no_kernel_is_computed_plainly(x: Tensor) -> None:
    with fused("everywhere"):
        assert not can_fuse(x)


def test_compilers_see_the_plain_form() -> None:
    seen = []

    def backend(graph, _):
        seen.append(can_fuse(features()))
        return graph.forward

    with fused("everywhere"):
        operator = Operator("doubling", lambda x: x * 3, lambda x: x * 2)
        x = features()
        assert torch.equal(torch.compile(operator, backend=backend)(x), 2 * x)
    assert seen


def test_a_right_form_is_chosen(caplog) -> None:
    operator = Operator("doubling", lambda x: x * 2, lambda x: x + x)
    assert operator.checked(features()) is operator.fused
    assert operator.checked(features(torch.bfloat16)) is operator.fused
    assert not caplog.text


def test_gradients_are_checked_wherever_the_first_call_comes_from() -> None:
    operator = Operator("doubling", lambda x: x * 2, lambda x: x + x)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert operator.checked(features()) is operator.fused


def slightly_wrong(x: Tensor) -> Tensor:
    return x * 2.2


def wrong_gradient(x: Tensor) -> Tensor:
    return (x * 3).detach() - x


def not_a_number(x: Tensor) -> Tensor:
    return x * 2 + (x - x) / (x - x)


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nPlease ...")


def wrong_shape(x: Tensor) -> Tensor:
    return (x * 2)[:, :, :-1]


@pytest.mark.parametrize("form", [slightly_wrong, wrong_gradient, not_a_number, failing, wrong_shape])
def test_a_wrong_form_is_reported_once_and_plain_torch_is_used(caplog, form) -> None:
    operator = Operator(f"doubling, {form.__name__}", form, lambda x: x * 2)
    for x in (features(), features(), features(torch.bfloat16)):
        assert operator.checked(x) is operator.plain
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)
    assert "the fused doubling, " in caplog.text


def test_out_of_memory_is_no_verdict() -> None:
    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Operator("doubling", full, lambda x: x * 2).checked(features())


def test_the_check_draws_from_no_generator_of_the_run() -> None:
    x, before = features(), torch.get_rng_state()
    Operator("doubling", lambda x: x * 2, lambda x: x + x).checked(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("rescales", [True, False])
@pytest.mark.parametrize("kind", ["halving", "doubling", "joining", "same", "one latent norm"])
def test_a_block_of_fused_operators_equals_the_plain_block(kind: str, rescales: bool) -> None:
    joins, resample = kind == "joining", {"halving": FirDownsample, "doubling": FirUpsample}.get(kind)
    block = ResidualBlock(
        12 if joins else 8,
        8,
        time_channels=4,
        latent_channels=4,
        dropout=0.0,
        second_norm_adaptive=kind != "one latent norm",
        skip_rescale=rescales,
        resample=resample() if resample else None,
    )
    for parameter in block.parameters():  # biases start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    x, temb, zemb = features().requires_grad_(), torch.randn(2, 4), torch.randn(2, 4)
    skip = features()[:, :4].contiguous(memory_format=torch.channels_last).requires_grad_() if joins else None
    learned = [x, *([] if skip is None else [skip]), *block.parameters()]

    def derivatives() -> list[Tensor]:
        y, same = block(x, temb, zemb, *([] if skip is None else [skip]))
        return [y, same, *torch.autograd.grad(y.square().sum() + same.sin().sum(), learned)]

    assert_same_fused_and_plain(derivatives)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_fused_attention_equals_plain_attention() -> None:
    attention = Attention(8, skip_rescale=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = features().requires_grad_()

    def derivatives() -> list[Tensor]:
        y = attention(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])]

    assert_same_fused_and_plain(derivatives)


@pytest.mark.parametrize("kind", ["block", "attention", "discriminator"])
def test_weights_that_zero_3_parts_are_used_by_their_own_layers_only(kind: str) -> None:
    sizes: Any = {"time_channels": 4, "latent_channels": 4, "dropout": 0.0, "second_norm_adaptive": True}
    module, inputs = {
        "block": (ResidualBlock(8, 12, **sizes, skip_rescale=True), (torch.empty(2, 4), torch.empty(2, 4))),
        "attention": (Attention(8, skip_rescale=True), ()),
        "discriminator": (DownBlock(8, 12, time_channels=4, halves=True), (torch.empty(2, 4),)),
    }[kind]
    ran, layers = set[str](), [(n, m) for n, m in module.named_modules() if hasattr(m, "weight") and "norm" not in n]
    module.to("meta")
    for name, layer in layers:
        layer.register_forward_hook(lambda *_, name=name: ran.add(name))
        for parameter in layer.parameters():
            parameter.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    with fused("everywhere"):
        module(features().to("meta"), *(x.to("meta") for x in inputs))
    assert ran == {name for name, _ in layers}


@pytest.mark.slow
@needs_interpreter
def test_the_penalty_of_a_fused_discriminator_block_equals_that_of_the_plain_block() -> None:
    block = DownBlock(8, 4, time_channels=4, halves=True)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, temb = features().requires_grad_(), torch.randn(2, 4)

    def derivatives() -> list[Tensor]:
        logits = block(x, temb).square().sum((1, 2, 3))
        penalty = gradient_penalty(logits, x)
        return [logits, penalty, *torch.autograd.grad(logits.sum() + penalty, list(block.parameters()))]

    assert_same_fused_and_plain(derivatives)


def assert_same_fused_and_plain(derivatives: Callable[[], list[Tensor]]) -> None:
    operations = Operations()
    with fused("everywhere"), operations:
        ours = derivatives()
    assert "ddgan" in operations.namespaces
    for of_fused, of_plain in zip(ours, derivatives(), strict=True):
        torch.testing.assert_close(of_fused, of_plain, atol=1e-4, rtol=1e-4)


class Operations(TorchDispatchMode):
    """Notes which libraries the operations inside belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces = set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))
