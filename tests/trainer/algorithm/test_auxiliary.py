"""Auxiliary losses of the generator against their formulas, and the normalization of the game's gradient."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig, forward_pair, sample_posterior
from tests.trainer.engine.conformance_rank import make_players, micro_batches
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.auxiliary import (
    Auxiliary,
    GradientScale,
    ReconstructionConfig,
    reconstruction_loss,
    transport_loss,
)
from trainer.algorithm.schedules import Cosine

DIFFUSION = Diffusion.from_config(DiffusionConfig())
X0, OTHER = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tanh()
TIMES = torch.arange(64) % 4


def test_each_loss_has_its_own_course_and_one_without_a_weight_is_not_there():
    falling = Cosine(start=8.0, end=0.0, decay_images=1000)
    both = Auxiliary(ReconstructionConfig(weight=falling), transport=0.5)
    assert [both.weights_at(images)["reconstruction"] for images in (0, 1000, 5000)] == [8.0, 0.0, 0.0]
    assert both.weights_at(500) == {"reconstruction": pytest.approx(4.0), "transport": 0.5}
    never = Cosine(start=0.0, end=0.0, decay_images=1000)
    assert both.names == ("reconstruction", "transport")
    assert Auxiliary(ReconstructionConfig(weight=never), transport=falling).names == ("transport",)


def test_reconstruction_is_the_mean_of_squares_or_of_absolute_values():
    x, y = X0.double().numpy(), OTHER.double().numpy()
    square, absolute = ReconstructionConfig(), ReconstructionConfig(distance="absolute")
    assert reconstruction_loss(square, X0, OTHER).item() == pytest.approx(((x - y) ** 2).mean())
    assert reconstruction_loss(absolute, X0, OTHER).item() == pytest.approx(np.abs(x - y).mean())


def test_transport_is_the_published_schedules_negative_log_likelihood_of_x_t():
    x_tm1, x_t = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    time = np.arange(5) / 4 * (1 - 1e-3) + 1e-3
    alpha_bar = np.exp(-0.5 * time**2 * 19.9 - time * 0.1)
    alpha = (alpha_bar[1:] / alpha_bar[:-1])[TIMES.numpy(), None, None, None]
    expected = (x_t.double().numpy() - np.sqrt(alpha) * x_tm1.double().numpy()) ** 2 / (2 * (1 - alpha))
    assert transport_loss(DIFFUSION, x_tm1, x_t, TIMES).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_transport_of_real_pairs_is_a_half_and_of_samples_with_the_true_x0_too():
    noises = [torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (2, 3, 4)]
    x_tm1, x_t = forward_pair(DIFFUSION, X0, TIMES, noises[0], noises[1])
    deviation = 0.5 * math.sqrt(2 / X0.numel())
    assert transport_loss(DIFFUSION, x_tm1, x_t, TIMES).item() == pytest.approx(0.5, abs=4 * deviation)
    drawn, wrong = (sample_posterior(DIFFUSION, x, x_t, TIMES, noises[2]) for x in (X0, OTHER))
    assert transport_loss(DIFFUSION, drawn, x_t, TIMES).item() == pytest.approx(0.5, abs=4 * deviation)
    assert transport_loss(DIFFUSION, wrong, x_t, TIMES).item() > 0.5 + 10 * deviation


def gradient_of(auxiliary: Auxiliary, weights: dict[str, float], scale: GradientScale | None = None) -> list[Tensor]:
    """That of G's parameters in an update of 16 images."""
    players, game = make_players(gradient_scale=scale), Adversarial(auxiliary=auxiliary)
    game.update_generator(players, micro_batches(0, 16, 8), weights)
    return [p.grad for p in players.generator.module.parameters() if p.grad is not None]


def test_the_weighted_transport_loss_is_added_to_the_game():
    both = Auxiliary(transport=1.0)
    without, once, thrice = (gradient_of(both, {"transport": weight}) for weight in (0.0, 1.0, 3.0))
    assert any(not torch.equal(a, b) for a, b in zip(without, once, strict=True))
    for a, b, c in zip(without, once, thrice, strict=True):
        torch.testing.assert_close(c - a, 3 * (b - a), atol=1e-5, rtol=1e-3)


def scaled(mean_square: float) -> GradientScale:
    scale = GradientScale()
    scale.load({"mean_square": torch.tensor(mean_square, dtype=torch.float64)})
    return scale


def test_only_the_games_gradient_is_divided_by_the_root_of_its_mean_square():
    transport = Auxiliary(transport=1.0)
    game, auxiliary = gradient_of(Auxiliary(), {}), gradient_of(transport, {"transport": 1.0}, GradientScale())
    both = gradient_of(transport, {"transport": 1.0}, scaled(0.25))
    for a, b, c in zip(game, auxiliary, both, strict=True):
        torch.testing.assert_close(c, 2 * a + b, atol=1e-5, rtol=1e-3)


def test_the_gradient_of_slopes_of_one_length_is_normalized_to_that_of_slopes_of_one():
    scale = GradientScale()
    slopes = 7.0 * torch.randint(0, 2, (16, 3, 4, 4)) * 2 - 7.0
    for step in range(3):
        found = [scale(slopes[i : i + 8] / 8 / 48, 0.5) for i in (0, 8)]
        scale.end_step(step + 1)
        if step == 0:
            assert not found[0].any()
            continue
        assert torch.cat(found).abs().unique().tolist() == pytest.approx([1 / 8 / 48])  # as the mean of 8 x 48 values
    assert scale.mean_square.item() == pytest.approx(49.0)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_the_mean_square_is_that_of_the_global_batch_for_any_split(size):
    slopes = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    whole = slopes / 16
    expected = (whole.numel() * whole.square().sum()).item()
    scale = GradientScale()
    for first in range(0, 16, size):
        scale(slopes[first : first + size] / size, size / 16)
    scale(slopes[:size], 0.0)  # padding
    scale.end_step(1)
    assert scale.mean_square.item() == pytest.approx(expected)


def test_the_mean_square_moves_by_a_tenth_and_not_by_what_is_not_finite():
    scale, one = scaled(4.0), torch.ones(1, 1, 1, 1)
    scale(3 * one, 1.0)
    scale.end_step(1)
    assert scale.mean_square.item() == pytest.approx(0.9 * 4 + 0.1 * 9)
    for value in (math.nan, math.inf):
        scale(value * one, 1.0)
        scale.end_step(2)
        assert scale.mean_square.item() == pytest.approx(4.5)


def test_state_returns_and_that_of_something_else_is_refused():
    assert scaled(2.5).state()["mean_square"].item() == 2.5
    fresh = scaled(2.5)
    fresh.load({})
    assert fresh.mean_square.item() == 0
    value = torch.tensor(1.0, dtype=torch.float64)
    for wrong in ({"probability": value}, {"mean_square": value.float()}, {"mean_square": -value}):
        with pytest.raises(ValueError, match="its scale of the game's gradient is not valid"):
            fresh.load(wrong)
    with pytest.raises(ValueError, match="its scale of the game's gradient is not valid"):
        fresh.load({"mean_square": value * math.nan})
