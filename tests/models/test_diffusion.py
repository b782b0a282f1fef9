import math
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig, forward_pair, posterior_mean, sample, sample_posterior

PUBLISHED = [(schedule, T) for schedule in ("vp", "geometric") for T in (1, 2, 4, 8)]
LEVELS = {1: (80.0,), 2: (0.8, 80.0), 4: (0.4, 1.2, 4.0, 80.0)}
SCHEDULES = [*PUBLISHED, *(("levels", T) for T in LEVELS)]
RANGE = {"vp": (0.1, 20.0), "geometric": (0.01, 0.99)}


def make(schedule: str, T: int) -> Diffusion:
    if schedule == "levels":
        return Diffusion.from_config(DiffusionConfig(num_timesteps=T, schedule="levels", levels=LEVELS[T]))
    beta_min, beta_max = RANGE[schedule]
    return Diffusion.from_config(
        DiffusionConfig(num_timesteps=T, schedule=schedule, beta_min=beta_min, beta_max=beta_max)  # pyright: ignore
    )


def images(*values: float) -> Tensor:
    """One constant 1x2x2 image per value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)


@pytest.mark.parametrize(("schedule", "T"), PUBLISHED)
def test_tables_equal_the_published_ones(schedule: str, T: int, golden_json) -> None:
    published = golden_json("schedules")[f"{schedule}_T{T}"]
    assert (published["beta_min"], published["beta_max"]) == RANGE[schedule]
    diffusion = make(schedule, T)
    ours = {
        "sigmas": diffusion.sigma,
        "sqrt_alphas": diffusion.sqrt_alpha,
        "sqrt_alpha_bars": diffusion.sqrt_alpha_bar,
        "sqrt_one_minus_alpha_bars": diffusion.sqrt_one_minus_alpha_bar,
        "posterior_betas": diffusion.sigma[1:] ** 2,
        "posterior_mean_coef_x0": diffusion.posterior_coef_x0,
        "posterior_mean_coef_xt": diffusion.posterior_coef_xt,
        "posterior_log_variance": diffusion.posterior_variance.clamp(min=1e-20).log(),
    }
    for name, table in ours.items():
        torch.testing.assert_close(table, torch.tensor(published[name]), atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize(("schedule", "T"), SCHEDULES)
def test_x_tm1_at_first_step_is_x0_exactly(schedule: str, T: int) -> None:
    x0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    x_tm1, _ = forward_pair(make(schedule, T), x0, torch.zeros(5, dtype=torch.int64), noise, noise)
    assert torch.equal(x_tm1, x0)


@pytest.mark.parametrize(("schedule", "T"), SCHEDULES)
def test_forward_pair_has_the_marginals_of_the_process(schedule: str, T: int) -> None:
    diffusion = make(schedule, T)
    t = torch.arange(T)
    one, zero = images(*[1.0] * T), images(*[0.0] * T)
    # The pair is linear in data and noises: three calls give its mean and variance.
    mean_tm1, mean_t = forward_pair(diffusion, one, t, zero, zero)
    first_tm1, first_t = forward_pair(diffusion, zero, t, one, zero)
    second_tm1, second_t = forward_pair(diffusion, zero, t, zero, one)
    alpha_bar = diffusion.sqrt_alpha_bar**2
    # float32 products of the tables against float32 cumulative products: a few units in the last place
    for mean, index in ((mean_tm1, t), (mean_t, t + 1)):
        torch.testing.assert_close(mean[:, 0, 0, 0], diffusion.sqrt_alpha_bar[index], atol=1e-6, rtol=0)
    assert not second_tm1.any()
    for variance, index in ((first_tm1**2, t), (first_t**2 + second_t**2, t + 1)):
        torch.testing.assert_close(variance[:, 0, 0, 0], 1 - alpha_bar[index], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("schedule", "T"), SCHEDULES)
def test_posterior_is_the_conditional_gaussian(schedule: str, T: int) -> None:
    diffusion = make(schedule, T)
    for t in range(1, T):
        # x_tm1 ~ N(a x0, v), x_t | x_tm1 ~ N(r x_tm1, w): conditioning on x_t by Bayes' rule in float64.
        a, v = diffusion.sqrt_alpha_bar[t].double(), diffusion.sqrt_one_minus_alpha_bar[t].double() ** 2
        r, w = diffusion.sqrt_alpha[t + 1].double(), diffusion.sigma[t + 1].double() ** 2
        variance = 1 / (1 / v + r**2 / w)
        x0, x_t = 0.7, -0.4
        expected = variance * (a * x0 / v + r * x_t / w)
        mean = posterior_mean(diffusion, images(x0), images(x_t), torch.tensor([t]))
        # alpha_bar is a float32 product, and 1 - alpha_bar loses digits at early steps
        assert mean[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=2e-5)
        assert diffusion.posterior_variance[t].item() == pytest.approx(variance.item(), rel=2e-5)


@pytest.mark.parametrize(("schedule", "T"), SCHEDULES)
def test_posterior_variance_is_zero_at_first_step(schedule: str, T: int) -> None:
    diffusion = make(schedule, T)
    assert diffusion.posterior_variance[0] == 0
    assert (diffusion.posterior_variance[1:] > 0).all()
    x0_pred, x_t, noise = torch.randn(3, 2, 1, 4, 4).unbind()
    t = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(
        sample_posterior(diffusion, x0_pred, x_t, t, noise), sample_posterior(diffusion, x0_pred, x_t, t, -noise)
    )


@pytest.mark.parametrize(("schedule", "T"), SCHEDULES)
def test_posterior_mean_at_first_step_is_x0_pred(schedule: str, T: int) -> None:
    x0_pred, x_t = torch.randn(2, 2, 1, 4, 4).unbind()
    mean = posterior_mean(make(schedule, T), x0_pred, x_t, torch.zeros(2, dtype=torch.int64))
    # the published float32 tables give x0_pred the weight 0.9999986 in the geometric schedule
    torch.testing.assert_close(mean, x0_pred, atol=0, rtol=1e-5)


def test_posterior_of_a_true_pair_has_the_law_of_x_tm1() -> None:
    diffusion = make("vp", 4)
    for t in range(4):
        # E and Var of a posterior draw, averaged over x_t given x0 = 1, are those of q(x_tm1 | x0).
        index = torch.tensor([t])
        mean_x_t = diffusion.sqrt_alpha_bar[t + 1].item()
        mean = posterior_mean(diffusion, images(1.0), images(mean_x_t), index)[0, 0, 0, 0]
        variance = (
            diffusion.posterior_variance[t]
            + diffusion.posterior_coef_xt[t] ** 2 * diffusion.sqrt_one_minus_alpha_bar[t + 1] ** 2
        )
        assert mean.item() == pytest.approx(diffusion.sqrt_alpha_bar[t].item(), abs=1e-5)
        assert variance.item() == pytest.approx(diffusion.sqrt_one_minus_alpha_bar[t].item() ** 2, abs=1e-5)


def test_last_image_is_nearly_pure_noise() -> None:
    assert make("vp", 4).sqrt_alpha_bar[-1].item() == pytest.approx(math.exp(-5.025), rel=1e-3)


def test_tables_move_with_to() -> None:
    diffusion = make("vp", 4)
    assert diffusion.num_timesteps == 4
    assert diffusion.to("meta").sigma.device.type == "meta"
    assert diffusion.sigma.device.type == "cpu"


def test_shrinking_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta_min is 3\.0 and beta_max is 2\.0.*set beta_min below beta_max"):
        DiffusionConfig(beta_min=3.0, beta_max=2.0)


def test_geometric_variance_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta_max is 20\.0.*below 1.*0\.01 and 0\.99, or set schedule to vp"):
        DiffusionConfig(schedule="geometric")


@pytest.mark.parametrize("T", LEVELS)
def test_given_levels_are_the_levels_of_the_images(T: int) -> None:
    torch.testing.assert_close(make("levels", T).noise_levels, torch.tensor(LEVELS[T]), rtol=1e-4, atol=0)


def test_levels_and_weights_of_x0_of_the_published_schedule() -> None:
    published = make("vp", 4)
    torch.testing.assert_close(published.noise_levels, torch.tensor([0.96, 3.42, 17.0, 152.0]), rtol=0.01, atol=0)
    torch.testing.assert_close(published.posterior_coef_x0, torch.tensor([1.0, 0.67, 0.27, 0.058]), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"schedule": "levels"}, "levels is null"),
        ({"levels": (1.0, 2.0), "num_timesteps": 2}, "schedule is vp"),
        ({"schedule": "levels", "levels": (1.0, 2.0)}, "2 entries, but num_timesteps is 4"),
        ({"schedule": "levels", "levels": (1.0, 1.0), "num_timesteps": 2}, "has to grow"),
    ],
)
def test_levels_that_are_none_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DiffusionConfig(**settings)


def test_generator_that_knows_x0_yields_x0() -> None:
    x0 = torch.rand(3, 1, 4, 4) * 2 - 1
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=4))
    images = sample(
        lambda x_t, t, z: x0,
        diffusion,
        noise_T=torch.randn_like(x0),
        draw=lambda step: (torch.randn(3, 5), torch.randn_like(x0)),
    )
    # the last posterior mean gives x0 the weight 1 + 1e-7
    torch.testing.assert_close(images, x0, atol=1e-6, rtol=0)


def test_steps_run_from_the_last_to_the_first_with_fresh_draws() -> None:
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=3))
    latents, noises = torch.randn(3, 2, 5), torch.randn(3, 2, 1, 4, 4)
    calls: list[tuple[Tensor, Tensor]] = []

    def generator(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        calls.append((t, z))
        return 0.5 * x_t + z.mean()

    noise_T = torch.randn(2, 1, 4, 4)
    images = sample(generator, diffusion, noise_T=noise_T, draw=lambda step: (latents[step], noises[step]))

    x = noise_T
    for step, (t, z) in zip((2, 1, 0), calls, strict=True):
        assert t.tolist() == [step, step]
        assert torch.equal(z, latents[step])
        x = sample_posterior(diffusion, 0.5 * x + z.mean(), x, t, noises[step])
    assert torch.equal(images, x)


def test_sampling_builds_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    images = sample(
        lambda x_t, t, z: weight * x_t,
        Diffusion.from_config(DiffusionConfig(num_timesteps=1)),
        noise_T=torch.randn(1, 1, 2, 2),
        draw=lambda step: (torch.randn(1, 5), torch.randn(1, 1, 2, 2)),
    )
    assert not images.requires_grad


def test_shapes_and_types_are_checked_at_run_time() -> None:
    diffusion = Diffusion.from_config(DiffusionConfig())
    image = torch.zeros(2, 3, 4, 4)
    t = torch.zeros(2, dtype=torch.int64)
    posterior_mean(diffusion, image, image, t)
    with pytest.raises(jaxtyping.TypeCheckError):
        posterior_mean(diffusion, image, torch.zeros(2, 3, 8, 8), t)
    with pytest.raises(jaxtyping.TypeCheckError):
        posterior_mean(diffusion, image, image, t.float())  # pyright: ignore[reportArgumentType]
