"""Images become pairs by their own draws, whatever else is in the batch, and the compiled pass draws the same."""

import shutil
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig, forward_pair
from models.wavelets import haar
from trainer.algorithm.pairs import (
    FOR_D,
    FOR_G,
    Conditions,
    DrawnPair,
    PairPurposes,
    RawBatch,
    checked,
    draw_micro_batch,
    draw_pair,
    pair_function,
    to_x0,
)
from trainer.algorithm.randomness import Draws, Purpose

DIFFUSION = Diffusion.from_config(DiffusionConfig())
SHAPE = (3, 16, 16)


def some_images(count: int) -> Tensor:
    """In the decoder's layout: channels are the last in memory."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def draws(start: int, stop: int, device: str = "cpu") -> Draws:
    return Draws(5, torch.tensor(7, device=device), torch.arange(start, stop, device=device))


def test_levels_become_minus_one_to_one():
    x0 = to_x0(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3), None)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_shapes_and_types_are_checked_at_run_time():
    with pytest.raises(jaxtyping.TypeCheckError):
        to_x0(some_images(4).float(), None)
    with pytest.raises(jaxtyping.TypeCheckError):
        to_x0(some_images(4), draws(0, 3).flips())


def test_flips_mirror_whole_images_by_their_own_coins():
    images, coins = some_images(64), draws(0, 64).flips()
    plain, flipped = to_x0(images, None), to_x0(images, coins)
    assert plain.is_contiguous()
    assert 0 < int(coins.sum()) < 64
    for i, coin in enumerate(coins.tolist()):
        assert torch.equal(flipped[i], plain[i].flip(-1) if coin else plain[i])


def test_a_pair_is_the_forward_process_of_the_flipped_images():
    images, d = some_images(8), draws(0, 8)
    batch = draw_micro_batch(RawBatch(images, Draws(5, 7, d.samples), latent_dim=6, flip=True, share=0.5), DIFFUSION)
    t, x0 = d.integers(Purpose.G_TIMESTEP, 4), to_x0(images, d.flips())
    noises = d.normals(Purpose.G_NOISE_TM1, SHAPE), d.normals(Purpose.G_NOISE_T, SHAPE)
    x_tm1, x_t = forward_pair(DIFFUSION, x0, t, *noises)
    pair = batch.pair_g
    assert torch.equal(pair.t, t)
    assert torch.equal(pair.x_tm1, x_tm1)
    assert torch.equal(pair.x_t, x_t)
    assert torch.equal(pair.z, d.normals(Purpose.G_LATENT, (6,)))
    assert torch.equal(pair.noise_posterior, d.normals(Purpose.G_NOISE_POSTERIOR, SHAPE))
    assert batch.share == 0.5
    assert not torch.equal(batch.pair_d.x_t, pair.x_t)  # draws of its own, for the same images


def test_a_sample_is_drawn_the_same_whatever_else_is_in_its_micro_batch():
    images = some_images(12)
    options = {"latent_dim": 6, "flip": True, "share": 1.0}
    whole = draw_micro_batch(RawBatch(images, draws(0, 12), **options), DIFFUSION)
    for start, stop in ((0, 4), (4, 12), (11, 12)):
        part = draw_micro_batch(RawBatch(images[start:stop], draws(start, stop), **options), DIFFUSION)
        for ours, theirs in ((part.pair_d, whole.pair_d), (part.pair_g, whole.pair_g)):
            for name in ("t", "x_tm1", "x_t", "z", "noise_posterior"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)[start:stop]), name
            masks = [pair.dropout(3, (5, 3), 0.4) for pair in (ours, theirs) if pair.dropout]
            assert torch.equal(masks[0], masks[1][start:stop])


def test_masks_of_the_updates_and_layers_differ():
    batch = draw_micro_batch(RawBatch(some_images(4), draws(0, 4), latent_dim=6, flip=False, share=1.0), DIFFUSION)
    masks = [pair.dropout(layer, (64,), 0.5) for pair in (batch.pair_d, batch.pair_g) for layer in (0, 1)]  # pyright: ignore
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 64 < (one == other).sum() < 192  # 256 fair coins agree 128 times, give or take 8


@pytest.fixture
def untyped() -> Iterator[None]:
    """The tests check shapes at run time; a compiler cannot trace through those checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_same_draws(compiled, count: int, purposes: PairPurposes, device: str = "cpu") -> None:
    tables, images = DIFFUSION.to(device), some_images(count).to(device)
    arguments = (images, draws(0, count, device), tables, purposes, 6, True)
    with torch.no_grad():
        t, *normals = compiled(*arguments)
        expected_t, *expected = draw_pair(*arguments)
    assert torch.equal(t, expected_t)
    for ours, theirs in zip(normals, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # rounding of log, sin and cos
    assert normals[0].is_contiguous()
    assert normals[0].requires_grad_(True).is_leaf  # as R1 needs it


@pytest.mark.slow
def test_traced_pass_draws_the_same(untyped):
    assert_same_draws(torch.compile(draw_pair, dynamic=False, fullgraph=True, backend="aot_eager"), 8, FOR_D)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("vectorized", [True, False])
def test_compiled_draws_are_the_plain_ones(untyped, vectorized):
    def draw(d: Draws) -> tuple[Tensor, Tensor]:
        return d.integers(Purpose.D_TIMESTEP, 1000), d.normals(Purpose.D_NOISE_T, (1, 6, 7))

    # Overflows of 32 and 64 bits, which compilers may take otherwise than torch, were seen in one or the other.
    options: Any = {} if vectorized else {"cpp.simdlen": 1}
    t, normals = torch.compile(draw, dynamic=False, fullgraph=True, options=options)(draws(0, 8))
    expected_t, expected = draw(draws(0, 8))
    assert torch.equal(t, expected_t)
    torch.testing.assert_close(normals, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_pass_on_the_gpu_draws_the_same(untyped, caplog):
    fused = pair_function("cuda")
    assert fused is not draw_pair
    for count, purposes in ((8, FOR_D), (4, FOR_D), (8, FOR_G)):
        assert_same_draws(fused, count, purposes, "cuda")
    assert not [record for record in caplog.records if record.name == "trainer.algorithm.pairs"]


def test_the_cpu_draws_by_plain_torch():
    assert pair_function("cpu") is draw_pair


def test_a_compiler_that_fails_is_reported_once_and_plain_torch_takes_over(caplog):
    def fail(*_: object):
        raise RuntimeError("Failed to find C compiler.\nPlease ...")

    draw = checked(fail)
    assert_same_draws(draw, 4, FOR_D)
    assert_same_draws(draw, 8, FOR_G)
    assert caplog.messages == [
        "the fused pass cannot be used (Failed to find C compiler.): pairs are drawn by plain torch, more slowly"
    ]


def test_a_compiled_pass_that_draws_something_else_is_not_used(caplog):
    def wrong(*arguments) -> DrawnPair:
        t, x_tm1, x_t, z, noise = draw_pair(*arguments)
        return t + 1, x_tm1, x_t, z, noise

    draw = checked(wrong)
    assert_same_draws(draw, 4, FOR_D)
    assert_same_draws(draw, 4, FOR_D)
    assert "the fused pass cannot be used" in caplog.text


def test_a_compiled_pass_that_draws_the_same_is_used_from_the_first_call_on():
    calls = []

    def right(*arguments):
        calls.append(1)
        return draw_pair(*arguments)

    draw = checked(right)
    for _ in range(3):
        assert_same_draws(draw, 4, FOR_D)
    assert len(calls) == 3


@pytest.mark.parametrize(("size", "purposes"), [(8, FOR_D), (4, FOR_G)])
def test_the_kernel_of_each_size_and_purpose_is_looked_at(caplog, size, purposes):
    def wrong_elsewhere(*arguments) -> DrawnPair:
        t, x_tm1, x_t, z, noise = draw_pair(*arguments)
        images, _, _, which, *_ = arguments
        return t if len(images) == 4 and which == FOR_D else t + 1, x_tm1, x_t, z, noise

    draw = checked(wrong_elsewhere)
    assert_same_draws(draw, 4, FOR_D)
    assert not caplog.text
    assert_same_draws(draw, size, purposes)
    assert_same_draws(draw, size, purposes)
    assert "the fused pass cannot be used" in caplog.text


def test_an_error_of_the_arguments_is_not_hidden(untyped):
    with pytest.raises(RuntimeError, match="size of tensor"):
        checked(draw_pair)(some_images(8), draws(0, 4), DIFFUSION, FOR_D, 6, True)


def test_what_is_given_is_mirrored_with_its_image_and_dropped_by_pure_draws():
    images, given, d = some_images(64), some_images(64)[:, :2].flip(0), draws(0, 64)

    def batch(start: int, stop: int, dropout: float):
        some = Draws(5, 7, torch.arange(start, stop))
        conditions = Conditions(given[start:stop], dropout)
        raw = RawBatch(images[start:stop], some, latent_dim=6, flip=True, share=1.0, conditions=conditions)
        return draw_micro_batch(raw, DIFFUSION)

    expected = to_x0(given, d.flips())
    for pair in (batch(0, 64, 0.0).pair_d, batch(0, 64, 0.0).pair_g):
        assert pair.condition is not None and torch.equal(pair.condition, expected)
        assert pair.given == (None, pair.condition)
    raw = RawBatch(images, Draws(5, 7, d.samples), latent_dim=6, flip=True, share=1.0, domain="haar")
    assert torch.equal(Conditions(given, 0.0).as_given(raw), haar(expected))
    whole, part = batch(0, 64, 0.3), batch(16, 24, 0.3)
    dropped = []
    for of_whole, of_part in ((whole.pair_d, part.pair_d), (whole.pair_g, part.pair_g)):
        assert of_whole.condition is not None and of_part.condition is not None
        assert torch.equal(of_whole.condition[16:24], of_part.condition)
        is_zero = of_whole.condition.flatten(1).abs().sum(1) == 0
        assert torch.equal(of_whole.condition[~is_zero], expected[~is_zero])
        dropped.append(is_zero)
    assert all(5 < int(is_zero.sum()) < 35 for is_zero in dropped)
    assert not torch.equal(*dropped)
