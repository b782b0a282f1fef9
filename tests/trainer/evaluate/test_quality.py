"""Figures of merit against closed forms on Gaussians, against scipy, and on sets whose answer is plain."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial import KDTree

from trainer.evaluate.quality import (
    Statistics,
    compare,
    density_and_coverage,
    frechet_distance,
    frechet_distance_at_infinity,
    inception_score,
    kernel_distance,
    precision_and_recall,
    statistics_of,
)


def gaussian(number: int, dimensions: int, mean: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(number, dimensions, generator=generator, dtype=torch.float64)


def test_frechet_distance_of_statistics_is_that_of_scipy():
    a, b = gaussian(50, 6, 0.0, 0) @ torch.randn(6, 6, dtype=torch.float64), gaussian(80, 6, 0.5, 1)
    c_a, c_b = (np.cov(x.T.numpy()) for x in (a, b))
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = shift + np.trace(c_a + c_b - 2 * np.real(scipy.linalg.sqrtm(c_a @ c_b)))
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_two_gaussians_has_its_closed_form():
    # |m|^2 = 9 + 16, and for diagonal covariances the rest is the sum of (sigma_a - sigma_b)^2 = 1 + 4.
    one = Statistics(
        mean=torch.zeros(2).double(), covariance=torch.diag(torch.tensor([1.0, 9.0])).double(), num_images=0
    )
    other = Statistics(
        mean=torch.tensor([3.0, 4.0]).double(), covariance=torch.diag(torch.tensor([4.0, 1.0])).double(), num_images=7
    )
    assert frechet_distance(one, other) == pytest.approx(30.0)


@pytest.mark.parametrize("number", [2, 10, 64, 65, 500])
def test_frechet_distance_of_a_set_to_itself_is_zero(number: int):
    points = torch.randn(number, 64, generator=torch.Generator().manual_seed(0)).relu()
    # The root of a singular covariance turns float64's 1e-16 into 1e-8 for each direction without spread.
    assert 0.0 <= frechet_distance(statistics_of(points), statistics_of(points)) < 1e-4


@pytest.mark.parametrize("number", [2, 10, 40])
def test_frechet_distance_of_fewer_points_than_features_is_exact(number: int):
    generator = torch.Generator().manual_seed(number)
    a = torch.randn(number, 64, generator=generator, dtype=torch.float64)
    b = torch.randn(number, 64, generator=generator, dtype=torch.float64) + 1.0
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    # With C_a = A A^T and C_b = B B^T, tr (C_a C_b)^(1/2) is the nuclear norm of A^T B: no root of a singular matrix.
    factor_a, factor_b = ((x - x.mean(dim=0)) / (number - 1) ** 0.5 for x in (a, b))
    root = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    expected = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + c_a.trace() + c_b.trace() - 2 * root
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(expected.item(), rel=1e-6)


def test_distance_at_infinity_of_gaussians_loses_the_bias_of_their_number():
    d, shift = 32, 0.2
    reference = Statistics(mean=torch.zeros(d).double(), covariance=torch.eye(d).double(), num_images=0)
    samples, known = gaussian(2000, d, shift, 0), d * shift**2
    biased, unbiased = (
        frechet_distance(statistics_of(samples), reference),
        frechet_distance_at_infinity(samples, reference),
    )
    # The mean of N samples alone adds d / N = 0.016, their covariance about d (d + 1) / 4 N = 0.13.
    assert biased - known > 0.1
    assert abs(unbiased - known) < 0.04


def test_distance_at_infinity_is_a_function_of_the_seed_and_leaves_the_random_state_alone():
    samples, reference = gaussian(200, 3, 0.5, 1), gaussian(300, 3, 0.0, 2)
    state = torch.get_rng_state()
    first, again, other = (frechet_distance_at_infinity(samples, reference, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert frechet_distance_at_infinity(samples, statistics_of(reference), seed=1) == first


def test_kernel_distance_is_the_unbiased_estimate():
    a, b = gaussian(40, 3, 0.0, 2), gaussian(40, 3, 1.0, 3)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 3 + 1) ** 3

    def without_diagonal(k: torch.Tensor) -> float:
        return ((k.sum() - k.trace()) / (40 * 39)).item()

    expected = without_diagonal(kernel(a, a)) + without_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean().item()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_gaussians_comes_to_its_closed_form():
    # In one dimension the kernel is (xy + 1)^3; E[x^n] of N(0, 1) and N(1, 1) for n = 1, 2, 3 are 0, 1, 0 and 1, 2, 4.
    def expected_kernel(p: tuple[float, ...], q: tuple[float, ...]) -> float:
        return p[2] * q[2] + 3 * p[1] * q[1] + 3 * p[0] * q[0] + 1

    p, q = (0.0, 1.0, 0.0), (1.0, 2.0, 4.0)
    closed = expected_kernel(p, p) + expected_kernel(q, q) - 2 * expected_kernel(p, q)
    torch.manual_seed(0)
    found = kernel_distance(gaussian(1000, 1, 0.0, 4), gaussian(1000, 1, 1.0, 5))
    assert found == pytest.approx(closed, rel=0.25)  # the standard error of 1,000 samples is about a tenth


def test_inception_score_of_sure_and_even_samples_is_the_number_of_classes():
    torch.manual_seed(0)
    sure = 50 * torch.eye(4).repeat(250, 1)
    assert inception_score(sure) == pytest.approx(4.0, rel=0.02)  # the splits are even by chance only
    assert inception_score(torch.zeros(100, 4)) == pytest.approx(1.0)
    assert inception_score(sure[:1].repeat(100, 1)) == pytest.approx(1.0)


def brute_force(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By scipy: in how many neighbourhoods of b each point of a lies, and whether each of them holds one."""
    radii = KDTree(b).query(b, k=k + 1)[0][:, -1]
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    within = distances <= radii
    return within.sum(axis=1), within.any(axis=0)


def test_precision_recall_density_and_coverage_are_those_of_scipys_neighbours():
    samples, reference = gaussian(1500, 4, 0.7, 6), gaussian(1300, 4, 0.0, 7)
    x, y = samples.numpy(), reference.numpy()
    precision, recall = precision_and_recall(samples, reference)
    assert precision == pytest.approx((brute_force(x, y, 3)[0] > 0).mean())
    assert recall == pytest.approx((brute_force(y, x, 3)[0] > 0).mean())
    counts, covered = brute_force(x, y, 5)
    assert density_and_coverage(samples, reference) == pytest.approx((counts.mean() / 5, covered.mean()))


def test_figures_of_the_data_themselves_of_one_mode_and_of_far_samples():
    generator = torch.Generator().manual_seed(8)
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])

    def draw(which: list[int]) -> torch.Tensor:
        return modes[torch.tensor(which).repeat(400 // len(which))] + torch.randn(400, 2, generator=generator)

    reference = draw([0, 1, 2, 3])
    same, collapsed, far = (compare(x, reference) for x in (draw([0, 1, 2, 3]), draw([2]), draw([0, 1, 2, 3]) + 1000))
    assert same.density == pytest.approx(1.0, abs=0.15)
    assert min(same.precision or 0, same.recall or 0, same.coverage or 0) > 0.9
    assert (collapsed.precision or 0) > 0.85
    assert 0.15 < (collapsed.recall or 0) < 0.3
    assert 0.15 < (collapsed.coverage or 0) < 0.3
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    assert same.fid < collapsed.fid < far.fid


def test_statistics_alone_give_the_frechet_distance_alone():
    samples, reference = gaussian(30, 3, 0.0, 9), gaussian(40, 3, 0.0, 10)
    quality = compare(samples, statistics_of(reference), logits=torch.zeros(30, 2))
    assert quality.fid == compare(samples, reference).fid
    assert quality.inception_score == pytest.approx(1.0)
    assert (quality.kid, quality.precision, quality.coverage) == (None, None, None)


def test_figures_are_a_function_of_the_seed_and_leave_the_random_state_alone():
    samples, reference = gaussian(40, 3, 0.0, 11), gaussian(60, 3, 0.3, 12)
    state = torch.get_rng_state()
    first, again, other = (compare(samples, reference, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.kid != other.kid
    assert torch.equal(torch.get_rng_state(), state)
    assert not math.isnan(first.kid or 0)
