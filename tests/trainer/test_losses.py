"""The objective against closed forms and finite differences."""

import torch
import torch.nn.functional as F

from trainer.losses import fake_loss, generator_loss, r1_penalty, real_loss


def test_losses_are_the_binary_cross_entropies_of_their_labels():
    logits = torch.linspace(-4, 4, 9)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(real_loss(logits), bce(logits, torch.ones(9)))
    torch.testing.assert_close(fake_loss(logits), bce(logits, torch.zeros(9)))
    torch.testing.assert_close(generator_loss(logits), bce(logits, torch.ones(9)))


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    weight = torch.randn(3, 4, 4)
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((x * weight).sum(dim=(1, 2, 3)), x)
    torch.testing.assert_close(penalty, weight.square().sum())


def test_gradient_of_r1_equals_finite_differences():
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def penalty(w: torch.Tensor) -> torch.Tensor:
        return r1_penalty((x.flatten(1).tanh() * w).sum(dim=1).square(), x)

    assert torch.autograd.gradcheck(penalty, (weight,))


def test_losses_of_bf16_logits_are_computed_in_fp32():
    logits = torch.tensor([0.25, -3.0], dtype=torch.bfloat16)
    for loss in (real_loss, fake_loss, generator_loss):
        assert loss(logits).dtype == torch.float32
