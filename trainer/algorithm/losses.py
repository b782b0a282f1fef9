"""Adversarial objectives of the denoising steps by name (arXiv 2112.07804, Eq. 4-6), and the gradient penalties.

Each objective is a pair of losses of D's logits on real and on generated x_tm1, both to be minimized. Its docstring
names the divergence between the real and the generated distribution of x_tm1 given x_t that G minimizes while D is the
best of all functions: p is the real density below, q the generated one. With any of them the pair (q = p, D constant)
is an equilibrium, which the penalties R1 and R2 make one that alternating updates come to (1801.04406).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.shapes import Image, Logits

Scalar = Float[Tensor, ""]


Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """One adversarial game.

    Attributes:
        discriminator: maps logits on reals and on fakes [B] to the terms of D's loss, which is their sum: `loss_d_real`
            and `loss_d_fake`, or `loss_d` where it does not fall into two.
        generator: maps logits on fakes and on the reals of the same x_t and t to G's loss. The second is None where
            `compares` is false.
        compares: whether G's loss reads D's logits on reals as well, which costs one more forward pass of D.
        bounded: whether D's loss has a lower bound without a penalty.
    """

    discriminator: Callable[[Logits, Logits], Losses]
    generator: Callable[[Logits, Logits | None], Scalar]
    compares: bool = False
    bounded: bool = True


def cross_entropy_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """-log sigmoid(D) on reals and -log(1 - sigmoid(D)) on fakes (Goodfellow et al., 1406.2661, Eq. 1).

    Its minimum over D, at D = log p - log q, is 2 log 2 - 2 JS(p, q).
    """
    return {
        "loss_d_real": F.softplus(-_precise(logits_real)).mean(),
        "loss_d_fake": F.softplus(_precise(logits_fake)).mean(),
    }


def non_saturating_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """-log sigmoid(D) on fakes (1406.2661, section 3).

    Its gradient at the best D is that of KL(q || p) - 2 JS(p, q) (Arjovsky and Bottou, 1701.04862, Theorem 2.5).
    """
    return F.softplus(-_precise(logits_fake)).mean()


def saturating_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """log(1 - sigmoid(D)) on fakes: the minimax game, whose value is 2 JS(p, q) - 2 log 2 (1406.2661, Theorem 1)."""
    return -F.softplus(_precise(logits_fake)).mean()


def wasserstein_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """-D on reals and D on fakes (Arjovsky et al., 1701.07875, Eq. 2).

    Over all D of Lipschitz constant 1 the minimum is -W1(p, q), the Wasserstein distance. Here the penalties bound D's
    slope instead of a constraint, so the loss is no distance in units of the data.
    """
    return {"loss_d_real": -_precise(logits_real).mean(), "loss_d_fake": _precise(logits_fake).mean()}


def linear_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """-D on fakes: with the Wasserstein critic W1(p, q) up to a constant of G, with the hinge's 2 TV(p, q)."""
    return -_precise(logits_fake).mean()


def least_squares_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """(D - 1)^2 / 2 on reals and D^2 / 2 on fakes (Mao et al., 1611.04076, Eq. 9).

    Its minimum over D, at D = p / (p + q), is (2 - chi^2) / 8, chi^2 being Pearson's between p + q and 2 q.
    """
    return {
        "loss_d_real": 0.5 * (_precise(logits_real) - 1).square().mean(),
        "loss_d_fake": 0.5 * _precise(logits_fake).square().mean(),
    }


def least_squares_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """(D - 1)^2 / 2 on fakes (1611.04076, Eq. 9).

    With the same term on reals, which does not depend on G, it is (2 + chi^2) / 8 at the best D. The paper's other
    choice, D^2 / 2 with targets 1 and -1 (Eq. 8), has the same divergence, but no force on a G whose samples all lie
    where D is 0: on the toy of the tests it collapsed.
    """
    return 0.5 * (_precise(logits_fake) - 1).square().mean()


def hinge_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """max(0, 1 - D) on reals and max(0, 1 + D) on fakes (Lim and Ye, 1705.02894; Miyato et al., 1802.05957, Eq. 16).

    Its minimum over D, at D = sign(p - q), is 2 - 2 TV(p, q), TV being the total variation.
    """
    return {
        "loss_d_real": F.relu(1 - _precise(logits_real)).mean(),
        "loss_d_fake": F.relu(1 + _precise(logits_fake)).mean(),
    }


def relativistic_d(logits_real: Logits, logits_fake: Logits) -> Losses:
    """softplus(D(fake) - D(real)) over pairs that share x_t and t (Jolicoeur-Martineau, 1807.00734, Eq. 9-10: RpGAN).

    log 2 less its minimum over D is a divergence of p and q (1901.02474, Theorem 3.1); used as in R3GAN (2501.05417).
    """
    return {"loss_d": F.softplus(_precise(logits_fake) - _precise(logits_real)).mean()}


def relativistic_g(logits_fake: Logits, logits_real: Logits | None = None) -> Scalar:
    """softplus(D(real) - D(fake)): the non-saturating form of the same comparison (1807.00734; 2501.05417, Eq. 2)."""
    assert logits_real is not None
    return F.softplus(_precise(logits_real) - _precise(logits_fake)).mean()


OBJECTIVES: dict[str, Objective] = {
    "non_saturating": Objective(cross_entropy_d, non_saturating_g),
    "saturating": Objective(cross_entropy_d, saturating_g),
    "wasserstein": Objective(wasserstein_d, linear_g, bounded=False),
    "least_squares": Objective(least_squares_d, least_squares_g),
    "hinge": Objective(hinge_d, linear_g),
    "relativistic": Objective(relativistic_d, relativistic_g, compares=True),
}
"""By the name in `training.objective`."""


def gradient_penalty(logits: Logits, x_tm1: Image) -> Scalar:
    """Mean over the batch of ||grad_{x_tm1} D||_2^2, unweighted (Mescheder et al., 1801.04406, Eq. 9).

    On real x_tm1 it is R1, on generated ones R2.

    Args:
        logits: D(x_tm1, x_t, t), computed in float32 from an `x_tm1` that requires grad.
        x_tm1: the cleaner image of the pair.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x_tm1, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def _precise(logits: Logits) -> Logits:
    """In float32 or better, whatever autocast made of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
