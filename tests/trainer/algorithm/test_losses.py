"""Each objective against its closed form, its divergence and a toy whose optimum is the data; the penalties."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from models.diffusion import Diffusion, DiffusionConfig
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.losses import OBJECTIVES, Divergence, UnbalancedTransportConfig, unbalanced_transport
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import MicroBatch, Pair
from trainer.engine.plain import TorchEngine

REAL, FAKE = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.linspace(3, -2, 9, dtype=torch.float64)

# How often each of five values occurs among 16 real and 16 generated samples.
P, Q = np.array([1, 2, 6, 4, 3]), np.array([5, 4, 1, 2, 4])


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


FORMULAS: dict[str, tuple[Callable, Callable]] = {
    "non_saturating": (
        lambda r, f: (-log_sigmoid(r)).mean() + (-log_sigmoid(-f)).mean(),
        lambda f, r: (-log_sigmoid(f)).mean(),
    ),
    "saturating": (
        lambda r, f: (-log_sigmoid(r)).mean() + (-log_sigmoid(-f)).mean(),
        lambda f, r: log_sigmoid(-f).mean(),
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f, r: -f.mean()),
    "least_squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda f, r: ((f - 1) ** 2).mean() / 2,
    ),
    "hinge": (
        lambda r, f: np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(),
        lambda f, r: -f.mean(),
    ),
    "relativistic": (lambda r, f: (-log_sigmoid(r - f)).mean(), lambda f, r: (-log_sigmoid(f - r)).mean()),
    "unbalanced_transport": (
        lambda r, f: (-log_sigmoid(r)).mean() + (-log_sigmoid(-f)).mean(),
        lambda f, r: -f.mean(),
    ),
}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_published_formula(name):
    objective, (formula_d, formula_g) = OBJECTIVES[name], FORMULAS[name]
    reals = REAL if objective.compares else None
    assert total(objective.discriminator(REAL, FAKE)).item() == pytest.approx(formula_d(REAL.numpy(), FAKE.numpy()))
    assert objective.generator(FAKE, reals).item() == pytest.approx(formula_g(FAKE.numpy(), REAL.numpy()))


CONJUGATES: dict[Divergence, Callable] = {
    "softplus": lambda u: -log_sigmoid(-u),
    "kl": np.exp,
    "chi_square": lambda u: np.where(u < -2, -1.0, (u / 2 + 1) ** 2 - 1),
    "none": lambda u: u,
}


@pytest.mark.parametrize("divergence", CONJUGATES)
def test_unbalanced_transport_is_the_conjugate_of_minus_d_on_reals_and_of_d_less_the_cost_on_fakes(divergence):
    objective = unbalanced_transport(UnbalancedTransportConfig(tau=0.05, divergence=divergence))
    P = CONJUGATES[divergence]
    x0_pred, x_t = torch.randn(2, 9, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = 0.05 * ((x0_pred - x_t) ** 2).flatten(1).sum(1).numpy()
    costed = objective.less_cost(FAKE, x0_pred, x_t)
    expected = P(-REAL.numpy()).mean() + P(FAKE.numpy() - cost).mean()
    assert total(objective.discriminator(REAL, costed)).item() == pytest.approx(expected)
    assert objective.generator(costed, None).item() == pytest.approx((cost - FAKE.numpy()).mean())
    assert objective.bounded == (divergence != "none")


def test_other_objectives_have_no_cost():
    x = torch.ones(9, 1, 1, 1)
    assert all(o.less_cost(FAKE, x, -x) is FAKE for name, o in OBJECTIVES.items() if name != "unbalanced_transport")


def test_cross_entropy_is_that_of_the_labels():
    bce, losses = F.binary_cross_entropy_with_logits, OBJECTIVES["non_saturating"].discriminator(REAL, FAKE)
    torch.testing.assert_close(losses["loss_d_real"], bce(REAL, torch.ones_like(REAL)))
    torch.testing.assert_close(losses["loss_d_fake"], bce(FAKE, torch.zeros_like(FAKE)))


# The divergences, on five values: the best D is known, its loss must be the value that the docstring states.


def spread(values: Tensor, counts: np.ndarray) -> Tensor:
    """The value of each sample."""
    return values.repeat_interleave(torch.from_numpy(counts))


def loss_d(name: str, d: Tensor) -> Tensor:
    """D's loss over all samples, D being a table."""
    if name == "relativistic":  # its pairs are independent: every real with every fake
        real, fake = torch.meshgrid(spread(d, P), spread(d, Q), indexing="ij")
        return total(OBJECTIVES[name].discriminator(real.flatten(), fake.flatten()))
    return total(OBJECTIVES[name].discriminator(spread(d, P), spread(d, Q)))


def best_d(name: str) -> Tensor:
    p, q = torch.from_numpy(P / 16), torch.from_numpy(Q / 16)
    if name in ("non_saturating", "saturating"):
        return (p / q).log()
    return p / (p + q) if name == "least_squares" else (p - q).sign()


def jensen_shannon() -> float:
    p, q = P / 16, Q / 16
    m = (p + q) / 2
    return float((p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2)


def pearson() -> float:
    """Between p + q and 2 q."""
    p, q = P / 16, Q / 16
    return float(((p + q - 2 * q) ** 2 / (p + q)).sum())


DIVERGENCES: dict[str, Callable[[], float]] = {
    "non_saturating": lambda: 2 * np.log(2) - 2 * jensen_shannon(),
    "saturating": lambda: 2 * np.log(2) - 2 * jensen_shannon(),
    "least_squares": lambda: (2 - pearson()) / 8,
    "hinge": lambda: 2 - 2 * np.abs(P - Q).sum() / 16 / 2,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_of_the_best_discriminator_is_the_divergence(name):
    d = best_d(name).requires_grad_()
    loss = loss_d(name, d)
    assert loss.item() == pytest.approx(DIVERGENCES[name]())
    for _ in range(20):  # convex in D, so that nothing near being better makes it the best
        assert loss_d(name, d.detach() + 0.1 * torch.randn_like(d)) >= loss - 1e-12


def test_least_squares_generator_loss_at_the_best_discriminator_is_that_of_pearsons_chi_squared():
    d, generator = best_d("least_squares"), OBJECTIVES["least_squares"].generator
    both = generator(spread(d, Q), None) + generator(spread(d, P), None)
    assert both.item() == pytest.approx((2 + pearson()) / 8)


def test_saturating_game_has_the_value_of_the_jensen_shannon_divergence():
    d = best_d("saturating")
    value = OBJECTIVES["saturating"].generator(spread(d, Q), None) - F.softplus(-spread(d, P)).mean()
    assert value.item() == pytest.approx(2 * jensen_shannon() - 2 * np.log(2))


def test_non_saturating_gradient_at_the_best_discriminator_is_that_of_reverse_kl_less_twice_js():
    theta = torch.from_numpy(np.log(Q / 16)).requires_grad_()
    q, p = theta.softmax(0), torch.from_numpy(P / 16)
    each = torch.stack([OBJECTIVES["non_saturating"].generator(d[None], None) for d in best_d("non_saturating")])
    (found,) = torch.autograd.grad((q * each).sum(), theta, retain_graph=True)
    m = (p + q) / 2
    js = (p * (p / m).log()).sum() / 2 + (q * (q / m).log()).sum() / 2
    (expected,) = torch.autograd.grad((q * (q / p).log()).sum() - 2 * js, theta)
    torch.testing.assert_close(found, expected)


def test_wasserstein_loss_of_the_best_lipschitz_critic_is_the_distance():
    x = np.array([0.0, 0.5, 2.0, 3.0, 7.0])
    slopes = -np.sign(np.cumsum(P - Q)[:-1])  # 1 or -1 between the points: Kantorovich's potential in one dimension
    d = torch.from_numpy(np.concatenate([[0.0], np.cumsum(slopes * np.diff(x))]))
    distance = wasserstein_distance(x, x, P, Q)
    assert loss_d("wasserstein", d).item() == pytest.approx(-distance)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = np.concatenate([[0.0], np.cumsum(rng.uniform(-1, 1, 4) * np.diff(x))])
        assert loss_d("wasserstein", torch.from_numpy(other)).item() >= -distance


def test_relativistic_divergence_is_zero_for_equal_distributions_and_positive_for_others():
    d = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_d("relativistic", d), d)
    assert loss_d("relativistic", d).item() == pytest.approx(np.log(2))
    assert loss_d("relativistic", d - 0.5 * gradient) < np.log(2) - 0.01  # some D tells these two apart
    real, fake = torch.meshgrid(spread(d, P), spread(d, P), indexing="ij")
    loss = total(OBJECTIVES["relativistic"].discriminator(real.flatten(), fake.flatten()))
    (gradient,) = torch.autograd.grad(loss, d)
    assert gradient.abs().max() < 1e-12  # convex, so that no D tells p from p


# A toy with a known answer, through the step itself: data N(2, 0.5^2), G an affine map of z, D a parabola, T = 1.


class AffineGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, label: None = None) -> Tensor:
        return (self.mean + self.scale * z)[:, :, None, None]


class Parabola(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x_tm1: Tensor, x_t: Tensor, t: Tensor, label: None = None) -> Tensor:
        x = x_tm1.flatten(1) - 1
        return self.linear(torch.cat([x, x.square()], dim=1))[:, 0]


def quantiles(seed: int, count: int = 64) -> Tensor:
    """A standard normal without sampling error, in an order of its own."""
    levels = (torch.arange(count) + 0.5) / count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    z = torch.special.ndtri(levels.double()).float()
    return (z / z.square().mean().sqrt())[order]


def train_toy(name: str, *, r2: bool) -> tuple[float, float, float]:
    """Mean and scale of G, and the largest weight of D, after some hundred plain gradient steps."""
    # The square of D's loss has a curvature, which bounds the rate.
    rate, steps = (0.1, 600) if name == "least_squares" else (0.3, 300)
    generator, discriminator = AffineGenerator(), Parabola()
    engine_g, engine_d = (
        TorchEngine(network, torch.optim.SGD(network.parameters(), lr=rate), 1, None)
        for network in (generator, discriminator)
    )
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=1))
    gamma_1, gamma_2 = (0.25, 0.25) if r2 else (0.5, 0.0)
    players = Players({"g": engine_g, "d": engine_d}, diffusion)
    game = Adversarial(OBJECTIVES[name], gamma_1, gamma_2)
    x0 = (2 + 0.5 * quantiles(0))[:, None, None, None]
    t, nothing = torch.zeros(64, dtype=torch.int64), torch.zeros_like(x0)
    for step in range(steps):
        pairs = [Pair(t, x0, nothing, quantiles(2 * step + i)[:, None], nothing) for i in (1, 2)]
        batch = MicroBatch(pairs[0], pairs[1], share=1.0)
        for part in game.parts:
            game.update(part, players, [batch], step)
    return generator.mean.item(), abs(generator.scale.item()), discriminator.linear.weight.abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("r2", [False, True], ids=["r1", "r1 and r2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_toy_comes_to_the_data(name, r2):
    mean, scale, weight = train_toy(name, r2=r2)
    assert mean == pytest.approx(2.0, abs=0.03)
    assert scale == pytest.approx(0.5, abs=0.03)
    assert weight < 0.05  # D cannot tell them apart


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_bf16_logits_are_computed_in_fp32(name):
    logits = torch.tensor([0.25, -3.0], dtype=torch.bfloat16)
    objective = OBJECTIVES[name]
    assert {loss.dtype for loss in objective.discriminator(logits, logits).values()} == {torch.float32}
    assert objective.generator(logits, logits).dtype == torch.float32
