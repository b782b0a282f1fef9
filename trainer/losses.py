"""The adversarial objective of the denoising steps (arXiv 2112.07804, Eq. 4-6): non-saturating, with R1."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.shapes import Image, Logits

Scalar = Float[Tensor, ""]


def real_loss(logits: Logits) -> Scalar:
    """Discriminator loss on real pairs: mean of softplus(-D) = -log sigmoid(D)."""
    return F.softplus(-_precise(logits)).mean()


def fake_loss(logits: Logits) -> Scalar:
    """Discriminator loss on generated pairs: mean of softplus(D) = -log(1 - sigmoid(D))."""
    return F.softplus(_precise(logits)).mean()


def generator_loss(logits: Logits) -> Scalar:
    """Non-saturating generator loss: mean of softplus(-D) on generated pairs (Goodfellow et al., 1406.2661)."""
    return F.softplus(-_precise(logits)).mean()


def r1_penalty(logits: Logits, x_tm1: Image) -> Scalar:
    """Mean over the batch of ||grad_{x_tm1} D||_2^2 on real pairs, unweighted (Mescheder et al., 1801.04406, Eq. 9).

    Args:
        logits: D(x_tm1, x_t, t), computed in float32 from an `x_tm1` that requires grad.
        x_tm1: the cleaner image of the real pair.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x_tm1, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def _precise(logits: Logits) -> Logits:
    """In float32 or better, whatever autocast made of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
