import torch
from torch import Tensor, nn

from models.dropout import Dropout, masks_from


def alternating(layer: int, shape: tuple[int, ...], probability: float) -> Tensor:
    """Every second feature stays, the first or the second by the layer's number."""
    return (torch.arange(shape[0]) % 2 == layer % 2).expand(3, -1)


def test_features_that_stay_are_scaled_and_the_others_zero() -> None:
    x, layer = torch.randn(3, 8), Dropout(0.2)
    with masks_from(layer, alternating):
        y = layer(x)
    torch.testing.assert_close(y[:, 0::2], x[:, 0::2] / 0.8)
    assert not y[:, 1::2].any()


def test_layers_are_told_apart_by_their_place() -> None:
    first, second = Dropout(0.5), Dropout(0.5)
    module, x = nn.Sequential(nn.Identity(), first, nn.Sequential(second)), torch.ones(3, 8)
    with masks_from(module, alternating):
        assert torch.equal(first(x) > 0, alternating(0, (8,), 0.5))
        assert torch.equal(second(x) > 0, alternating(1, (8,), 0.5))


def test_dropout_is_off_outside_training() -> None:
    x, layer = torch.randn(3, 8), Dropout(0.5).eval()
    with masks_from(layer, alternating):
        assert layer(x) is x


def test_masks_are_torchs_where_none_are_given() -> None:
    x, layer = torch.ones(10_000, 1), Dropout(0.3)
    with masks_from(layer, alternating):
        pass
    for _ in range(2):  # also after masks were given once
        kept = layer(x) > 0
        assert abs(kept.float().mean() - 0.7) < 0.02  # four standard deviations
        assert torch.equal(layer(x).unique(), torch.tensor([0.0, 1 / 0.7]))
        with masks_from(layer, None):
            assert not torch.equal(layer(x) > 0, kept)


def test_gradient_flows_through_the_features_that_stay_alone() -> None:
    x, layer = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), Dropout(0.5)
    with masks_from(layer, alternating):
        assert torch.autograd.gradcheck(layer, x)
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(gradient > 0, alternating(0, (8,), 0.5))
