import torch
from torch import nn
from torch.nn import functional as F

from models.blocks import AdaptiveGroupNorm, Attention, LatentMapping, ResidualBlock, merge
from models.layers import NEAR_ZERO
from models.resample import FirDownsample


def test_merge_keeps_the_variance_of_two_independent_branches() -> None:
    a, b = torch.randn(2, 8, 4, 32, 32).unbind()
    assert abs(merge(a, b, rescale=True).std().item() - 1) < 0.02
    assert torch.equal(merge(a, b, rescale=False), a + b)


def test_latent_mapping_ignores_the_length_of_z() -> None:
    mapping = LatentMapping(8, 16, 2)
    z = torch.randn(3, 8)
    assert len(mapping.layers) == 3
    torch.testing.assert_close(mapping(z), mapping(10 * z))


def test_adaptive_norm_starts_as_plain_group_norm_for_a_zero_embedding() -> None:
    norm = AdaptiveGroupNorm(8, 4)
    x = 3 + 2 * torch.randn(2, 8, 4, 4)
    expected = F.group_norm(x, 2, eps=1e-6)
    torch.testing.assert_close(norm(x, torch.zeros(2, 4))[0], expected)
    assert norm.style.bias.tolist() == [1.0] * 8 + [0.0] * 8


def test_adaptive_norm_scales_then_shifts() -> None:
    norm = AdaptiveGroupNorm(8, 4)
    x, zemb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    gamma, beta = norm.style(zemb).chunk(2, dim=1)
    expected = gamma[:, :, None, None] * F.group_norm(x, 2, eps=1e-6) + beta[:, :, None, None]
    torch.testing.assert_close(norm(x, zemb)[0], expected)


def test_attention_is_softmax_over_all_pixels() -> None:
    attention = Attention(8, skip_rescale=False)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 4, 6)
    h = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, eps=1e-6).flatten(2).mT
    logits = attention.query(h) @ attention.key(h).mT / 8**0.5
    h = attention.out(logits.softmax(dim=-1) @ attention.value(h))
    expected = x + h.mT.unflatten(2, (4, 6))
    # two float32 orders of summation over 24 pixels and 8 channels
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
    in_channels_last = attention(x.contiguous(memory_format=torch.channels_last))
    assert in_channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(in_channels_last, expected, atol=1e-5, rtol=1e-5)


def make_block(c_in: int, c_out: int, dropout: float = 0.0, resample: nn.Module | None = None) -> ResidualBlock:
    return ResidualBlock(
        c_in,
        c_out,
        time_channels=8,
        latent_channels=4,
        dropout=dropout,
        second_norm_adaptive=True,
        skip_rescale=False,
        resample=resample,
    )


def test_residual_block_starts_as_the_identity() -> None:
    x, temb, zemb = torch.randn(2, 8, 4, 4), torch.randn(2, 8), torch.randn(2, 4)
    # the second convolution starts at scale 1e-10, that is weights of about 1e-6
    torch.testing.assert_close(make_block(8, 8)(x, temb, zemb)[0], x, atol=1e-4, rtol=0)


def test_initial_scales_inside_blocks() -> None:
    block, attention = make_block(8, 8), Attention(8, skip_rescale=True)
    assert block.conv2.weight.abs().max().item() <= (3 * NEAR_ZERO / 72) ** 0.5
    assert attention.out.weight.abs().max().item() <= (3 * NEAR_ZERO / 8) ** 0.5
    for layer in (attention.query, attention.key, attention.value):
        assert 0.03 < layer.weight.abs().max().item() <= (3 * 0.1 / 8) ** 0.5


def test_shortcut_is_learned_where_channels_or_resolution_change() -> None:
    assert not list(make_block(8, 8).shortcut.parameters())
    assert list(make_block(8, 16).shortcut.parameters())
    assert list(make_block(8, 8, resample=FirDownsample()).shortcut.parameters())


def test_dropout_acts_in_training_only() -> None:
    block = make_block(8, 8, dropout=0.5)
    nn.init.normal_(block.conv2.weight)
    x, temb, zemb = torch.randn(2, 8, 4, 4), torch.randn(2, 8), torch.randn(2, 4)
    assert not torch.equal(block(x, temb, zemb)[0], block(x, temb, zemb)[0])
    block.eval()
    assert torch.equal(block(x, temb, zemb)[0], block(x, temb, zemb)[0])
