"""Adversarial objectives by name (arXiv 2112.07804, Eq. 4-6).

Each objective is a pair of losses on D's logits for real and generated x_tm1, both to be minimized. The docstrings name
the divergence between the real and the generated distribution of x_tm1 given x_t that G minimizes if D is optimal. In
them, p is the real density and q the generated one. Every objective has the equilibrium (q = p, D constant); the
penalties R1 and R2 make alternating updates converge to it (1801.04406).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from models.shapes import Image, Logits

Scalar = Float[Tensor, ""]
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The losses of one adversarial game.

    Attributes:
        discriminator: maps logits on reals and on fakes, each [B], to the terms of D's loss, which is their sum:
            `loss_d_real` and `loss_d_fake`, or `loss_d` alone if the loss cannot be split.
        generator: maps logits on fakes, and on the reals of the same x_t and t, to G's loss. The second argument is
            None unless `compares` is true.
        compares: whether G's loss also needs D's logits on reals, which costs one more forward pass of D.
        bounded: whether D's loss has a lower bound without a penalty.
        certainty: maps logits on reals and on fakes to what is positive where D holds a real image for real.
        tau: weight of the squared distance of x0_pred and x_t, which is subtracted from the logits on fakes before
            they enter a loss; 0: none.
    """

    discriminator: Callable[[Logits, Logits], Losses]
    generator: Callable[[Logits, Logits | None], Scalar]
    compares: bool = False
    bounded: bool = True
    certainty: Callable[[Logits, Logits], Logits] = lambda logits_real, logits_fake: logits_real
    tau: float = 0.0

    def less_cost(self, logits_fake: Logits, x0_pred: Image, x_t: Image) -> Logits:
        """Logits on fakes less the cost of transporting x_t to x0_pred."""
        if not self.tau:
            return logits_fake
        return precise(logits_fake) - self.tau * (x0_pred - x_t).square().sum(dim=(1, 2, 3))


def cross_entropy_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """-log sigmoid(D) on reals and -log(1 - sigmoid(D)) on fakes (Goodfellow et al., 1406.2661, Eq. 1).

    Its minimum over D, at D = log p - log q, is 2 log 2 - 2 JS(p, q).
    """
    return {
        "loss_d_real": F.softplus(-precise(logits_real)).mean(),
        "loss_d_fake": F.softplus(precise(logits_fake)).mean(),
    }


def non_saturating_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """-log sigmoid(D) on fakes (1406.2661, section 3).

    Its gradient at the best D is that of KL(q || p) - 2 JS(p, q) (Arjovsky and Bottou, 1701.04862, Theorem 2.5).
    """
    return F.softplus(-precise(logits_fake)).mean()


def saturating_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """log(1 - sigmoid(D)) on fakes: the minimax game, whose value is 2 JS(p, q) - 2 log 2 (1406.2661, Theorem 1)."""
    return -F.softplus(precise(logits_fake)).mean()


def wasserstein_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """-D on reals and D on fakes (Arjovsky et al., 1701.07875, Eq. 2).

    Over all D with Lipschitz constant 1 the minimum is -W1(p, q), the negative Wasserstein distance. Here penalties
    replace that constraint, so the loss is not a distance in units of the data.
    """
    return {"loss_d_real": -precise(logits_real).mean(), "loss_d_fake": precise(logits_fake).mean()}


def linear_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """-D on fakes: for the Wasserstein critic W1(p, q) up to a constant in G; for the hinge critic 2 TV(p, q)."""
    return -precise(logits_fake).mean()


def least_squares_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """(D - 1)^2 / 2 on reals and D^2 / 2 on fakes (Mao et al., 1611.04076, Eq. 9).

    Its minimum over D, at D = p / (p + q), is (2 - chi^2) / 8, where chi^2 is Pearson's between p + q and 2 q.
    """
    return {
        "loss_d_real": 0.5 * (precise(logits_real) - 1).square().mean(),
        "loss_d_fake": 0.5 * precise(logits_fake).square().mean(),
    }


def least_squares_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """(D - 1)^2 / 2 on fakes (1611.04076, Eq. 9).

    With the same term on reals, which does not depend on G, it is (2 + chi^2) / 8 at the optimal D. The paper's other
    choice, D^2 / 2 with targets 1 and -1 (Eq. 8), has the same divergence, but its gradient vanishes if D is 0 on all
    of G's samples: on the toy problem of the tests it collapsed.
    """
    return 0.5 * (precise(logits_fake) - 1).square().mean()


def hinge_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """max(0, 1 - D) on reals and max(0, 1 + D) on fakes (Lim and Ye, 1705.02894; Miyato et al., 1802.05957, Eq. 16).

    Its minimum over D, at D = sign(p - q), is 2 - 2 TV(p, q), where TV is the total variation.
    """
    return {
        "loss_d_real": F.relu(1 - precise(logits_real)).mean(),
        "loss_d_fake": F.relu(1 + precise(logits_fake)).mean(),
    }


def relativistic_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """softplus(D(fake) - D(real)) over pairs that share x_t and t (Jolicoeur-Martineau, 1807.00734, Eq. 9-10: RpGAN).

    log 2 minus its minimum over D is a divergence of p and q (1901.02474, Theorem 3.1); used as in R3GAN (2501.05441).
    """
    return {"loss_d": F.softplus(precise(logits_fake) - precise(logits_real)).mean()}


def relativistic_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """softplus(D(real) - D(fake)): the non-saturating form of `relativistic_d` (1807.00734; 2501.05441, Eq. 2)."""
    assert logits_real is not None
    return F.softplus(precise(logits_real) - precise(logits_fake)).mean()


Divergence = Literal["softplus", "kl", "chi_square", "none"]


@dataclass(frozen=True, kw_only=True)
class UnbalancedTransportConfig:
    """Settings of objective unbalanced_transport (RDUOT, 2311.17101)."""

    tau: PositiveFloat = 1e-3
    """Weight of the transport cost, the squared distance of x0_pred and x_t, summed over pixels. RDUOT takes 1e-3 at
    32 px, 1e-4 at 64 px and 1e-7 at 256 px."""
    divergence: Divergence = "softplus"
    """How much mass may stay behind: the convex function of D's loss. `softplus` as in RDUOT; `kl` and `chi_square` for
    these divergences; `none` for plain transport, which leaves nothing behind."""


def conjugate(divergence: Divergence, u: Logits) -> Logits:
    """The convex conjugate P(u) of a divergence, by which reals and fakes enter D's loss (UOTM, 2305.14777, section 3).

    softplus: log(1 + e^u); kl: e^u; chi_square: u + u^2 / 4, but -1 below u = -2; none: u.
    """
    if divergence == "softplus":
        return F.softplus(u)
    if divergence == "kl":
        return u.exp()
    return torch.where(u >= -2, u + u.square() / 4, -1.0) if divergence == "chi_square" else u


def transport_d(logits_real: Logits, logits_fake: Logits, divergence: Divergence = "softplus") -> Losses:
    """P(-D) on reals and P(D - cost) on fakes (RDUOT, 2311.17101); the cost is already in the second argument.

    With P(u) = u it is the dual of optimal transport from x_t to x0. Other P let D leave out mass that is costly to
    move, such as outliers.
    """
    return {
        "loss_d_real": conjugate(divergence, -precise(logits_real)).mean(),
        "loss_d_fake": conjugate(divergence, precise(logits_fake)).mean(),
    }


def unbalanced_transport(config: UnbalancedTransportConfig) -> "Objective":
    """Objective unbalanced_transport with its settings."""
    discriminator = partial(transport_d, divergence=config.divergence)
    bounded = config.divergence != "none"
    return replace(OBJECTIVES["unbalanced_transport"], discriminator=discriminator, bounded=bounded, tau=config.tau)


def difference(logits_real: Logits, logits_fake: Logits) -> Logits:
    """D(real) - D(fake), for objectives that leave the level of the logits free."""
    return precise(logits_real) - precise(logits_fake)


def above_half(logits_real: Logits, logits_fake: Logits) -> Logits:
    """D(real) - 1/2, for targets 1 and 0."""
    return precise(logits_real) - 0.5


OBJECTIVES: dict[str, Objective] = {
    "non_saturating": Objective(cross_entropy_d, non_saturating_g),
    "saturating": Objective(cross_entropy_d, saturating_g),
    "wasserstein": Objective(wasserstein_d, linear_g, bounded=False, certainty=difference),
    "least_squares": Objective(least_squares_d, least_squares_g, certainty=above_half),
    "hinge": Objective(hinge_d, linear_g),
    "relativistic": Objective(relativistic_d, relativistic_g, compares=True, certainty=difference),
    "unbalanced_transport": Objective(transport_d, linear_g, tau=UnbalancedTransportConfig().tau),
}
"""Keyed by the name in `training.objective`; `unbalanced_transport` has settings of its own."""


def precise(output: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A network's output in at least float32, whatever dtype autocast gave it."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
