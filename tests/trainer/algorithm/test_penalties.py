"""The exact penalty, its estimate by finite differences, and the images at which that is taken."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithm.penalties import PenaltyDraws, Subset, finite_difference_penalty, gradient_penalty
from trainer.algorithm.randomness import Draws


def test_penalty_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    weight = torch.randn(3, 4, 4)
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty((x * weight).sum(dim=(1, 2, 3)), x)
    torch.testing.assert_close(penalty, weight.square().sum())


def test_gradient_of_the_penalty_equals_finite_differences():
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def penalty(w: torch.Tensor) -> torch.Tensor:
        return gradient_penalty((x.flatten(1).tanh() * w).sum(dim=1).square(), x)

    assert torch.autograd.gradcheck(penalty, (weight,))


def curved(weight: Tensor, x: Tensor) -> Tensor:
    """A discriminator with curvature."""
    return (x.flatten(1).tanh() @ weight).square().sum(dim=1)


def test_finite_differences_are_the_squared_quotient_of_the_logits_and_the_noise():
    x, noise, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 1, 2, 3), (4, 1, 2, 3), (6, 5)))
    found = finite_difference_penalty(lambda x: curved(weight, x), x, noise, 0.01)
    expected = ((curved(weight, x + 0.01 * noise) - curved(weight, x)) ** 2).mean() / 0.01**2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_finite_differences_are_the_exact_penalty_in_the_mean_over_the_noise():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 2, 3), torch.randn(6, 5)
    images = x.expand(400_000, -1, -1, -1)
    found = finite_difference_penalty(lambda x: curved(weight, x), images, torch.randn(images.shape), 0.01)
    exact = gradient_penalty(curved(weight, x := x.requires_grad_()), x)
    # The square of a normal variable deviates by sqrt(2) of its mean: 0.22% in the mean of 400,000.
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0)


def test_gradient_of_finite_differences_flows_through_both_passes():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1, 2, 3, dtype=torch.float64), torch.randn(2, 1, 2, 3, dtype=torch.float64)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    estimate = lambda w: finite_difference_penalty(lambda x: curved(w, x), x, noise, 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(estimate, (weight,))


@given(
    groups=st.integers(1, 24),
    group_size=st.integers(1, 4),
    every=st.integers(1, 8),
    cuts=st.lists(st.integers(1, 23), max_size=5),
)
def test_subsets_of_micro_batches_are_every_nth_group_of_the_global_batch(groups, group_size, every, cuts):
    """However the batch is split: the same images, and the same mean over them."""
    values = torch.rand(groups * group_size, dtype=torch.float64)
    positions = torch.arange(len(values))
    expected = (positions // group_size) % every == 0
    borders = sorted({0, groups, *(cut for cut in cuts if cut < groups)})
    taken, mean = [], 0.0
    for first, last in itertools.pairwise(borders):
        start, size = first * group_size, (last - first) * group_size
        subset = Subset.of(every, start, size, group_size, len(values))
        assert len(subset(positions[start : start + size])) % group_size == 0
        if subset.weight:
            taken += subset(positions[start : start + size]).tolist()
        share = size / len(values)
        mean += share * subset.weight * subset(values[start : start + size]).mean().item()
    assert taken == positions[expected].tolist()
    assert mean == pytest.approx(values[expected].mean().item(), rel=1e-9)


def test_noise_of_an_image_does_not_depend_on_the_micro_batch_it_is_in():
    whole = PenaltyDraws.of(Draws(5, 7, torch.arange(16)), (1, 4, 4), Subset.of(2, 0, 16, 4, 16), ("r1", "r2"))
    half = PenaltyDraws.of(Draws(5, 7, torch.arange(8, 16)), (1, 4, 4), Subset.of(2, 8, 8, 4, 16), ("r1", "r2"))
    assert torch.equal(whole.noise["r1"][4:], half.noise["r1"])
    assert torch.equal(whole.noise["r2"][4:], half.noise["r2"])
    assert not torch.equal(whole.noise["r1"], whole.noise["r2"])
