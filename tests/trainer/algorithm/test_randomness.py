"""Draws are Philox's, depend on nothing but (seed, step, sample, purpose), and have the distributions they claim."""

import numpy as np
import pytest
import torch
from scipy import stats

from trainer.algorithm.randomness import Draws, Purpose, fold_seed, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_equals_the_known_answers_of_its_authors(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key)  # pyright: ignore[reportArgumentType]
    assert tuple(int(word) for word in words) == expected


def test_a_sample_draws_the_same_whatever_else_is_in_its_batch():
    whole = Draws(seed=5, step=9, samples=torch.arange(16)).normals(Purpose.D_NOISE_T, (3, 5, 5))
    for start, stop in ((0, 1), (3, 10), (15, 16)):
        part = Draws(seed=5, step=9, samples=torch.arange(start, stop)).normals(Purpose.D_NOISE_T, (3, 5, 5))
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("changed", ["seed", "high seed", "step", "sample", "purpose"])
def test_each_part_of_the_key_changes_the_draws(changed):
    def draw(name: str) -> torch.Tensor:
        seed = {"seed": 8, "high seed": 7 + 2**40}.get(name, 7)
        sample, step = (4, 2) if name == "sample" else (3, 3 if name == "step" else 2)
        purpose = Purpose.G_NOISE_T if name == "purpose" else Purpose.D_NOISE_T
        return Draws(seed, step, torch.tensor([sample])).normals(purpose, (64,))

    correlation = np.corrcoef(draw("")[0], draw(changed)[0])[0, 1]
    assert abs(correlation) < 0.5  # 64 independent pairs stay within four standard deviations, 4 / 8


def test_normals_pass_a_test_of_normality():
    values = Draws(0, 0, torch.arange(100)).normals(Purpose.G_LATENT, (1000,)).double().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3  # the draws are fixed: this cannot fail now and then
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / values.size)


def test_timesteps_and_flips_are_uniform():
    draws = Draws(3, 1, torch.arange(40_000))
    assert stats.chisquare(draws.integers(Purpose.D_TIMESTEP, 4).bincount(minlength=4)).pvalue > 1e-3
    assert stats.chisquare(draws.flips().long().bincount(minlength=2)).pvalue > 1e-3


def test_masks_keep_features_at_the_rate_asked_for_and_differ_between_layers():
    draws = Draws(3, 1, torch.arange(100))
    masks = [draws.keeps(Purpose.G_DROPOUT, layer, (10, 101), 0.3) for layer in (0, 1)]
    for keep in masks:
        assert keep.dtype == torch.bool
        assert abs(keep.float().mean() - 0.7) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5
    assert not torch.equal(*masks)
    assert torch.equal(draws.keeps(Purpose.G_DROPOUT, 0, (10, 101), 0.3), masks[0])


def test_a_step_may_be_a_tensor():
    number, tensor = (Draws(3, step, torch.arange(4)).normals(Purpose.G_LATENT, (9,)) for step in (5, torch.tensor(5)))
    assert torch.equal(number, tensor)


def test_a_shape_that_four_does_not_divide_is_filled():
    draws = Draws(1, 1, torch.arange(2))
    assert draws.normals(Purpose.D_LATENT, (7,)).shape == (2, 7)
    assert draws.normals(Purpose.D_LATENT, (1,)).shape == (2, 1)


def test_folded_seeds_differ_and_fit_torch():
    seeds = {fold_seed(seed, word) for seed in range(20) for word in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_draws_equal_cpu_draws():
    cpu = Draws(11, 12, torch.arange(32))
    gpu = Draws(11, 12, torch.arange(32, device="cuda"))
    assert torch.equal(cpu.integers(Purpose.D_TIMESTEP, 1000), gpu.integers(Purpose.D_TIMESTEP, 1000).cpu())
    ours, theirs = (d.normals(Purpose.D_NOISE_T, (3, 32, 32)).cpu() for d in (cpu, gpu))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
