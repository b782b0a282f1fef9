"""Auxiliary losses of the generator against their formulas, and the normalization of the game's gradient."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig, forward_pair, sample_posterior
from models.generator import GeneratorConfig
from tests.trainer.engine.conformance_rank import make_players, micro_batches
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.augmentation import AugmentationConfig
from trainer.algorithm.auxiliary import (
    Auxiliary,
    GradientScale,
    ReconstructionConfig,
    afd_loss,
    reconstruction_loss,
    step_regression_loss,
    transport_loss,
)
from trainer.algorithm.schedules import Cosine
from trainer.config.sections import TrainingConfig

DIFFUSION = Diffusion.from_config(DiffusionConfig())
X0, OTHER = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tanh()
TIMES = torch.arange(64) % 4
SETTINGS = TrainingConfig(total_images=1, global_batch_size=1, r1_gamma=0.0, afd=1.0, denoising=1.0)


def test_each_loss_has_its_own_course_and_one_without_a_weight_is_not_there():
    falling = Cosine(start=8.0, end=0.0, decay_images=1000)
    both = Auxiliary(ReconstructionConfig(weight=falling), transport=0.5)
    assert [both.weights_at(images)["reconstruction"] for images in (0, 1000, 5000)] == [8.0, 0.0, 0.0]
    assert both.weights_at(500) == {"reconstruction": pytest.approx(4.0), "transport": 0.5}
    never = Cosine(start=0.0, end=0.0, decay_images=1000)
    assert both.names == ("reconstruction", "transport")
    assert Auxiliary(ReconstructionConfig(weight=never), transport=falling).names == ("transport",)
    predicting = Auxiliary(afd=falling, denoising=1.0)
    assert (predicting.names, predicting.names_of_d) == (("afd",), ("denoising", "afd_regression"))
    assert predicting.predicts == ("x0", "x_t")
    assert predicting.weights_at(1000) == {"afd": 0.0, "denoising": 1.0, "afd_regression": 0.0}
    assert Auxiliary(afd=never, denoising=never).predicts == ()


def test_reconstruction_is_the_mean_of_squares_or_of_absolute_values():
    x, y = X0.double().numpy(), OTHER.double().numpy()
    square, absolute = ReconstructionConfig(), ReconstructionConfig(distance="absolute")
    assert reconstruction_loss(square, X0, OTHER).item() == pytest.approx(((x - y) ** 2).mean())
    assert reconstruction_loss(absolute, X0, OTHER).item() == pytest.approx(np.abs(x - y).mean())


def alphas(t: Tensor) -> np.ndarray:
    """Those of the published schedule for T = 4, in float64, [B, 1, 1, 1]."""
    time = np.arange(5) / 4 * (1 - 1e-3) + 1e-3
    alpha_bar = np.exp(-0.5 * time**2 * 19.9 - time * 0.1)
    return (alpha_bar[1:] / alpha_bar[:-1])[t.numpy(), None, None, None]


def test_transport_is_the_published_schedules_negative_log_likelihood_of_x_t():
    x_tm1, x_t = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    alpha = alphas(TIMES)
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


def two_squares(x_tm1: Tensor, x_t: Tensor, t: Tensor, regressed: np.ndarray) -> tuple[float, float]:
    """SIDDM's |x_t - sqrt(alpha) x_tm1|^2 / (2 beta) and |x_t - C|^2 / (2 beta), per pixel, in float64."""
    alpha, x_tm1, x_t = alphas(t), x_tm1.double().numpy(), x_t.double().numpy()  # pyright: ignore
    first, second = ((x_t - mean) ** 2 / (2 * (1 - alpha)) for mean in (np.sqrt(alpha) * x_tm1, regressed))
    return first.mean(), second.mean()


def test_afd_is_the_difference_of_two_squares_and_the_regression_minimizes_the_second():
    x_tm1, x_t, predicted = torch.randn(3, 64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    alpha = alphas(TIMES)
    regressed = np.sqrt(alpha) * x_tm1.double().numpy() + np.sqrt(1 - alpha) * predicted.double().numpy()
    first, second = two_squares(x_tm1, x_t, TIMES, regressed)
    assert afd_loss(DIFFUSION, x_tm1, x_t, TIMES, predicted).item() == pytest.approx(first - second, rel=1e-4)
    assert step_regression_loss(DIFFUSION, x_tm1, x_t, TIMES, predicted).item() == pytest.approx(second, rel=1e-5)
    assert afd_loss(DIFFUSION, x_tm1, x_t, TIMES, torch.zeros_like(x_t)).item() == 0


def judge(players, pair, x_tm1: Tensor, name: str) -> np.ndarray:
    """D's prediction of an image of the small networks, which have both, in float64."""
    with torch.no_grad():
        _, predictions = players.discriminator.module(x_tm1, pair.x_t, pair.t, predicting=True)
    return predictions[("x0", "x_t").index(name)].double().numpy()


PREDICTING = Adversarial(auxiliary=Auxiliary(afd=1.0, denoising=1.0))


def test_both_updates_report_the_losses_of_what_d_predicts_in_float64():
    players, (batch,) = make_players(loss="predictions"), micro_batches(0, 16, 16, PREDICTING)
    found = {}
    for part in ("d", "g"):  # nothing moves: these engines never step
        found |= PREDICTING.update(part, players, [batch], 0)
    fakes = {}
    for name, pair in (("d", batch.pair_d), ("g", batch.pair_g)):
        with torch.no_grad():
            x0_pred = players.generator.module(pair.x_t, pair.t, pair.z)
        fakes[name] = sample_posterior(DIFFUSION, x0_pred, pair.x_t, pair.t, pair.noise_posterior)

    assert batch.x0 is not None
    denoised = judge(players, batch.pair_d, batch.pair_d.x_tm1, "x0")
    assert found["denoising"].item() == pytest.approx(((denoised - batch.x0.double().numpy()) ** 2).mean(), rel=1e-4)

    squares = {}
    for name, pair in (("d", batch.pair_d), ("g", batch.pair_g)):
        alpha, noise = alphas(pair.t), judge(players, pair, fakes[name], "x_t")
        regressed = np.sqrt(alpha) * fakes[name].double().numpy() + np.sqrt(1 - alpha) * noise
        squares[name] = two_squares(fakes[name], pair.x_t, pair.t, regressed)
    assert found["afd_regression"].item() == pytest.approx(squares["d"][1], rel=1e-4)
    assert found["afd"].item() == pytest.approx(squares["g"][0] - squares["g"][1], rel=1e-3)
    assert {s.name for s in Adversarial.of(SETTINGS, GeneratorConfig()).statistics} >= set(found) - {"logits_g"}


@pytest.mark.parametrize(("loss", "of_head"), [("denoising", 0), ("afd_regression", 1)])
def test_the_weighted_losses_of_predictions_are_added_to_those_of_d(loss, of_head):
    def gradient(weight: float) -> dict[str, Tensor]:
        players = make_players(loss="predictions")
        batches = micro_batches(0, 16, 8, PREDICTING)
        PREDICTING.update_discriminator(players, batches, r1_gamma=1.0, weights={loss: weight})
        found = {name: p.grad for name, p in players.discriminator.module.named_parameters()}
        return {name: value for name, value in found.items() if value is not None}

    without, once, thrice = (gradient(weight) for weight in (0.0, 1.0, 3.0))
    for name, a in without.items():
        torch.testing.assert_close(thrice[name] - a, 3 * (once[name] - a), atol=1e-5, rtol=1e-3)
    of_heads = [once[f"decoder.conv_out.{head}.weight"] for head in (0, 1)]
    assert of_heads[of_head].any() and not of_heads[1 - of_head].any()
    assert not without[f"decoder.conv_out.{of_head}.weight"].any() and without["conv_in.weight"].any()
    assert not torch.allclose(without["conv_in.weight"], once["conv_in.weight"])  # the trunk learns by it as well


def test_the_regression_moves_no_weight_of_g_and_afd_none_of_d():
    players, batches = make_players(loss="predictions"), micro_batches(0, 16, 8, PREDICTING)
    PREDICTING.update("d", players, batches, 0)
    assert all(p.grad is None for p in players.generator.module.parameters())
    players = make_players(loss="predictions")
    PREDICTING.update("g", players, batches, 0)
    assert all(p.grad is None for p in players.discriminator.module.parameters())


def test_d_predicts_the_images_that_it_sees():
    """With a view, x0 and x_t are those of the view."""
    game = replace(PREDICTING, augmentation=AugmentationConfig(transforms=("shift", "cutout"), probability=1.0))
    players, (batch,) = make_players(loss="predictions"), micro_batches(0, 16, 16, game)
    found = game.update("d", players, [batch], 0) | game.update("g", players, [batch], 0)
    pair, view = batch.pair_d, batch.pair_d.view
    assert view is not None and batch.x0 is not None
    denoised = judge(players, pair, view(pair.x_tm1), "x0")
    expected = ((denoised - view(batch.x0).double().numpy()) ** 2).mean()
    assert found["denoising"].item() == pytest.approx(expected, rel=1e-4)
    pair, view = batch.pair_g, batch.pair_g.view
    assert view is not None
    with torch.no_grad():
        x0_pred = players.generator.module(pair.x_t, pair.t, pair.z)
    fake = view(sample_posterior(DIFFUSION, x0_pred, pair.x_t, pair.t, pair.noise_posterior))
    alpha = alphas(pair.t)
    noise = judge(players, pair, fake, "x_t")
    regressed = np.sqrt(alpha) * fake.double().numpy() + np.sqrt(1 - alpha) * noise
    first, second = two_squares(fake, view(pair.x_t), pair.t, regressed)
    assert found["afd"].item() == pytest.approx(first - second, rel=1e-3)


def gradient_of(auxiliary: Auxiliary, weights: dict[str, float], scale: GradientScale | None = None) -> list[Tensor]:
    """That of G's parameters in an update of 16 images, with a discriminator that predicts."""
    players, game = make_players(gradient_scale=scale, loss="predictions"), Adversarial(auxiliary=auxiliary)
    game.update_generator(players, micro_batches(0, 16, 8), weights)
    return [p.grad for p in players.generator.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["transport", "afd"])
def test_the_weighted_loss_is_added_to_the_game(name):
    both = replace(Auxiliary(denoising=1.0), **{name: 1.0})
    without, once, thrice = (gradient_of(both, {name: weight}) for weight in (0.0, 1.0, 3.0))
    assert any(not torch.equal(a, b) for a, b in zip(without, once, strict=True))
    for a, b, c in zip(without, once, thrice, strict=True):
        torch.testing.assert_close(c - a, 3 * (b - a), atol=1e-5, rtol=1e-3)


def scaled(mean_square: float) -> GradientScale:
    scale = GradientScale()
    scale.load({"mean_square": torch.tensor(mean_square, dtype=torch.float64)})
    return scale


@pytest.mark.parametrize("name", ["transport", "afd"])
def test_only_the_games_gradient_is_divided_by_the_root_of_its_mean_square(name):
    losses = replace(Auxiliary(denoising=1.0), **{name: 1.0})
    game, auxiliary = gradient_of(Auxiliary(), {}), gradient_of(losses, {name: 1.0}, GradientScale())
    both = gradient_of(losses, {name: 1.0}, scaled(0.25))
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


def test_the_mean_square_stays_in_its_place_for_updates_that_are_recorded():
    scale = scaled(4.0)
    held = scale.mean_square
    scale(torch.ones(1, 1, 1, 1), 1.0)
    scale.end_step(1)
    assert held.item() == pytest.approx(0.9 * 4 + 0.1)
    scale.load({})
    assert scale.mean_square is held and held.item() == 0


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
