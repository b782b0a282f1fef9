"""Objective gaussian: what it draws, what it learns in a toy with a known answer, that it has no discriminator."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.diffusion import (
    Diffusion,
    DiffusionConfig,
    Sampler,
    nearest_step,
    noise_in,
    noisy,
    noisy_at,
    sample,
    x0_without,
)
from models.noise_levels import NoiseConfig
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.algorithm.gaussian import Gaussian, NoisyBatch
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.randomness import Draws
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.engine.plain import TorchEngine
from trainer.plan.cost import count_costs
from trainer.plan.plan import make_plan, render
from trainer.sample.draw import sample_run

MANY = Diffusion.from_config(DiffusionConfig(num_timesteps=200))


class LinearDenoiser(nn.Module):
    """Predicts x0 or the noise as a line in x_t, another one for each t: enough where the data are Gaussian."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.zeros(num_timesteps)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, label: None = None) -> Tensor:
        assert not z.any()
        return self.slope[t].view(-1, 1, 1, 1) * x_t + self.offset[t].view(-1, 1, 1, 1)


def best_line(diffusion: Diffusion, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] of data N(mean, deviation^2): slope and offset for each t."""
    a, s = diffusion.sqrt_alpha_bar[1:].double(), diffusion.sqrt_one_minus_alpha_bar[1:].double()
    slope = a * deviation**2 / (a**2 * deviation**2 + s**2)
    return slope, mean - slope * a * mean


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
def test_best_denoiser_in_many_steps_draws_the_data(sampler: Sampler):
    thousand = Diffusion.from_config(DiffusionConfig(num_timesteps=1000))
    slope, offset = best_line(thousand, 0.3, 0.2)
    generator = torch.Generator().manual_seed(0)

    def denoise(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return (slope[t].view(-1, 1, 1, 1) * x_t + offset[t].view(-1, 1, 1, 1)).float()

    def noise() -> Tensor:
        return torch.randn(20_000, 1, 1, 1, generator=generator)

    images = sample(denoise, thousand, noise_T=noise(), draw=lambda t: (torch.zeros(1), noise()), sampler=sampler)
    # The standard error of 20,000 samples is 0.0014 and 0.001. The posterior's variance is a little small for steps
    # that are not infinitely many: with 200 of them the deviation is 0.184.
    assert images.mean().item() == pytest.approx(0.3, abs=0.01)
    assert images.std().item() == pytest.approx(0.2, abs=0.01)


def test_best_gaussian_denoiser_in_one_step_draws_the_mean_alone():
    one = Diffusion.from_config(DiffusionConfig(num_timesteps=1))
    slope, offset = best_line(one, 0.3, 0.2)
    x_T = torch.randn(1000, 1, 1, 1)
    images = sample(lambda x, t, z: slope[0] * x + offset[0], one, noise_T=x_T, draw=lambda t: (x_T, x_T))
    assert images.std() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_update_comes_to_the_conditional_mean(prediction):
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=2, beta_max=3.0))
    network = LinearDenoiser(2)
    engine = TorchEngine(network, torch.optim.SGD(network.parameters(), lr=0.5), 1, None)
    players, method = Players({"g": engine}, diffusion), Gaussian(prediction)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        engine.set_rates(0.5 if step < 200 else 0.05)
        t = torch.arange(512) % 2
        x0, noise = (
            0.3 + 0.2 * torch.randn(512, 1, 1, 1, generator=generator),
            torch.randn(512, 1, 1, 1, generator=generator),
        )
        batch = NoisyBatch(t, x0, noisy(diffusion, x0, t, noise), torch.zeros(512, 1), share=1.0)
        method.update("g", players, [batch], step)
    predict = method.x0_predictor(network, diffusion)
    slope, offset = best_line(diffusion, 0.3, 0.2)
    for t in (0, 1):
        x_t = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1)
        found = predict(x_t, torch.full((5,), t), torch.ones(5, 1))
        torch.testing.assert_close(found, (slope[t] * x_t + offset[t]).float(), atol=0.03, rtol=0)


class LinearAtAnyLevel(nn.Module):
    """The best line for data N(0, 0.5^2) is c_skip x; this one learns its factor c, which should come to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, sigma: Tensor, z: Tensor, label: None = None) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        return self.factor * 0.25 / (sigma**2 + 0.25) * x_t * (1 + sigma**2).sqrt()


CONTINUOUS = Gaussian("x0", NoiseConfig(kind="log_normal", log_mean=-0.4, log_deviation=1.6))


def test_update_at_continuous_levels_goes_to_the_conditional_mean_and_stays_there():
    generator, moves = torch.Generator().manual_seed(0), []
    x0, noise = torch.randn(2, 1_000_000, 1, 1, 1, generator=generator).unbind()
    sigma = (2 * torch.rand(1_000_000, generator=generator)).exp()
    x_t = noisy_at(sigma, x0 := 0.5 * x0, noise)
    batch = NoisyBatch(nearest_step(MANY, sigma.log()), x0, x_t, torch.zeros(1_000_000, 1), share=1.0, sigma=sigma)
    for factor in (0.9, 1.0, 1.1):
        network = LinearAtAnyLevel()
        torch.nn.init.constant_(network.factor, factor)
        engine = TorchEngine(network, torch.optim.SGD(network.parameters(), lr=1.0), 1, None)
        CONTINUOUS.update("g", Players({"g": engine}, MANY), [batch], 0)
        moves.append(network.factor.item() - factor)
    assert moves[0] > 0.01
    assert abs(moves[1]) < 0.1 * moves[0]
    assert moves[2] < -0.01


def test_levels_are_log_normal_and_noise_the_image_as_those_of_the_steps():
    images = torch.randint(0, 256, (4000, 1, 4, 4), dtype=torch.uint8)
    batch = CONTINUOUS.draw(RawBatch(images, Draws(1, 7, torch.arange(4000)), 3, flip=False, share=1.0), MANY)
    assert batch.sigma is not None
    log_sigma = batch.sigma.log()
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.08)  # three standard errors
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.06)
    levels = MANY.noise_levels
    distances = (log_sigma[:, None] - levels.log()).abs()
    torch.testing.assert_close(distances.gather(1, batch.t[:, None])[:, 0], distances.amin(1))
    noise = torch.randn(200, 1, 4, 4)
    t = torch.arange(200)
    torch.testing.assert_close(
        noisy_at(levels, batch.x0[:200], noise), noisy(MANY, batch.x0[:200], t, noise), atol=1e-5, rtol=1e-5
    )


def test_weight_is_that_of_edm_up_to_its_limit():
    """With SGD the factor moves by the learning rate times the weighted slope of the error."""
    sigma = torch.tensor([0.05, 0.5, 3.0])
    weights = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    for limit in (None, 10.0):
        network = LinearAtAnyLevel()
        engine = TorchEngine(network, torch.optim.SGD(network.parameters(), lr=1.0), 1, None)
        method = replace(CONTINUOUS, noise=replace(CONTINUOUS.noise, max_weight=limit))
        x0, noise = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
        x_t = noisy_at(sigma, x0, noise)
        batch = NoisyBatch(torch.zeros(3, dtype=torch.int64), x0, x_t, torch.zeros(3, 1), 1.0, sigma=sigma)
        method.update("g", Players({"g": engine}, MANY), [batch], 0)
        line = 0.25 / (sigma**2 + 0.25) * (1 + sigma**2).sqrt()
        slope = (-2 * x0 * line.view(-1, 1, 1, 1) * x_t).mean(dim=(1, 2, 3))
        expected = -(weights.clamp(max=limit or float("inf")) * slope).mean()
        torch.testing.assert_close(network.factor.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.prediction=epsilon", "generator.output_tanh=false"], "training.prediction is epsilon: set"),
        (["generator.time_embedding=positional"], "generator.time_embedding is positional, which sees only the step"),
    ],
)
def test_continuous_levels_that_the_network_cannot_see_are_refused(overrides, said):
    given = ["training.objective=gaussian", "training.noise.kind=log_normal", "generator.time_embedding=log_sigma"]
    with pytest.raises(ConfigError, match=said):
        load_config("digits", [*given, *overrides])


@pytest.mark.slow
def test_run_at_continuous_levels_resumes_bitwise_and_draws_by_steps(tiny, tmp_path):
    more = ["training.objective=gaussian", "training.noise.kind=log_normal", "generator.time_embedding=log_sigma"]
    more += ["generator.sigma_data=0.5", "generator.output_tanh=false"]
    straight = configure(tiny, tmp_path / "straight", *more)
    stopped = configure(tiny, tmp_path / "stopped", *more)
    outcome, recorder = train(straight)
    train(stopped, Stopper(at=2))
    train(stopped)
    step = outcome.step
    assert_same_state(state_of(tmp_path / "stopped", step), state_of(tmp_path / "straight", step))
    assert any(name.startswith("squared_error") for name in recorder.metrics[step])
    images = sample_run(tmp_path / "straight", num=2, seed=0)
    assert images.shape[0] == 2


def test_noise_and_x0_are_recovered_from_x_t():
    x0, noise, t = torch.rand(6, 3, 4, 4) * 2 - 1, torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 5, 50, 120, 150])
    x_t = noisy(MANY, x0, t, noise)
    torch.testing.assert_close(noise_in(MANY, x_t, x0, t), noise, atol=2e-5, rtol=0)  # divided by 0.02 at t = 0
    torch.testing.assert_close(x0_without(MANY, x_t, noise, t), x0, atol=2e-5, rtol=0)


def test_noisy_batch_is_a_function_of_seed_step_and_sample():
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)

    def draw(first: int, last: int) -> NoisyBatch:
        draws = Draws(1, 7, torch.arange(first, last))
        return Gaussian().draw(RawBatch(images[first:last], draws, latent_dim=3, flip=True, share=0.5), MANY)

    whole, part = draw(0, 6), draw(2, 5)
    for name in ("t", "x0", "x_t", "z"):
        assert torch.equal(getattr(whole, name)[2:5], getattr(part, name))
    assert len(whole.t.unique()) > 1


GAUSSIAN = ("training.objective=gaussian", "diffusion.num_timesteps=20")


@pytest.mark.slow
def test_run_without_a_discriminator_resumes_bitwise(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, recorder = train(configure(tiny, whole, *GAUSSIAN))
    stopped, _ = train(configure(tiny, parts, *GAUSSIAN), Stopper(at=5))
    assert not stopped.finished
    train(configure(tiny, parts, *GAUSSIAN))
    ours, theirs = state_of(parts, 10), state_of(whole, 10)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not [name for name in ours if name.startswith("discriminator")]
    assert "loss_g" in recorder.metrics[10]
    assert not [name for name in recorder.metrics[10] if name.endswith("_d") and name != "skipped_updates_d"]


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_samples_come_by_both_samplers(tiny, tmp_path, prediction):
    more = (f"training.prediction={prediction}", f"generator.output_tanh={str(prediction == 'x0').lower()}")
    train(configure(tiny, tmp_path, *GAUSSIAN, *more))
    drawn = [sample_run(tmp_path, 4, seed=0, sampler=sampler) for sampler in ("ancestral", "deterministic")]
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[1], sample_run(tmp_path, 4, seed=0, sampler="deterministic"))


def test_deterministic_sampler_is_refused_for_an_adversarial_run(tiny, tmp_path):
    train(configure(tiny, tmp_path, "training.total_images=16"))
    with pytest.raises(ValueError, match=r"sampler deterministic does not fit this run, .* works only with ancestral"):
        sample_run(tmp_path, 4, seed=0, sampler="deterministic")


@pytest.mark.slow
def test_plan_knows_that_there_is_no_discriminator(tiny, tmp_path):
    config = configure(tiny, tmp_path, *GAUSSIAN)
    adversarial, regression = count_costs(configure(tiny, tmp_path)), count_costs(config)
    assert regression.parameters_g == adversarial.parameters_g
    assert (regression.parameters_d, regression.update_d.flops_per_image) == (0, 0)
    # Forward, and backward to the parameters and to all features but the image: a little less than three passes.
    assert 2.5 < regression.update_g.flops_per_image / regression.forward_g < 3
    assert "there is none" in render(make_plan(config))
