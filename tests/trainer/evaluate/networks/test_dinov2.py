"""DINOv2's ViT-L/14: names and shapes of the published state dict, its numbers, and how images become its input."""

import hashlib

import torch
from torch import Tensor

from trainer.evaluate.networks.dinov2 import DinoV2, as_dgm_eval

NAMES = "3d1fd28f02a1a4a88d36a03761d175cc8e13dbd3a9474d68a4beaa0414331922"
RECORDED = [0.344671, 0.595185, -0.241363, 0.542716, -0.453976, -0.265058, -0.263191, 0.449993]


def names_and_shapes(state: dict[str, Tensor]) -> str:
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_names_and_shapes_are_those_of_the_published_weights() -> None:
    """The hash is that of the state dict of dinov2 0.0.1.dev2's ViT-L/14 for 518 px, less the mask token."""
    with torch.device("meta"):
        state = DinoV2().state_dict()
    assert len(state) == 342
    assert names_and_shapes(state) == NAMES


def test_made_weights_give_the_recorded_numbers() -> None:
    """Recorded from dinov2 0.0.1.dev2's own network of the same widths, with the same weights and image."""
    network = DinoV2(width=32, depth=2, num_heads=2).eval()
    for seed, (_, parameter) in enumerate(sorted(network.named_parameters())):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    x = torch.sin(torch.arange(3.0 * 224 * 224)).view(1, 3, 224, 224)
    with torch.no_grad():
        features = network(x)
    assert features.shape == (1, 32)
    # Other processors add in another order.
    torch.testing.assert_close(features[0, ::4], torch.tensor(RECORDED), rtol=1e-3, atol=1e-4)


def test_input_is_antialiased_rounded_to_levels_and_normalized() -> None:
    lines = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    lines[..., ::2] = 255  # every second column: only an antialiased image of half the size is grey
    x = as_dgm_eval(lines)
    levels = x[0, :, 100, 100] * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    torch.testing.assert_close(levels * 255, (levels * 255).round(), rtol=0, atol=1e-3)
    assert x.shape == (1, 3, 224, 224) and (levels - 0.5).abs().max() < 0.03
