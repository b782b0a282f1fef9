"""FID's Inception: names and shapes of the published state dict, its numbers, and how images become its input."""

import hashlib

import pytest
import torch
from torch import Tensor

from trainer.evaluate.networks.inception import (
    Inception,
    as_clean_fid,
    as_pytorch_fid,
    as_tensorflow,
    logits_without_bias,
)

NAMES = "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
RECORDED_FEATURES = [0.219148, 0.0, 0.817660, 0.039349, 0.0, 0.127250, 0.128714, 0.0]
RECORDED_LOGITS = [10.167540, 6.543143, -0.263052, -9.912271, -1.346264, -3.400082, -5.196600]


def names_and_shapes(state: dict[str, Tensor]) -> str:
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_names_and_shapes_are_those_of_the_published_weights() -> None:
    """The hash is that of the state dict of torch-fidelity 0.4.0's network, which the published file fits."""
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 566
    assert names_and_shapes(state) == NAMES


def made(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that keep the signal's size: each tensor a function of its name's place among the sorted names."""
    result = {}
    for seed, (name, value) in enumerate(sorted(state.items())):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            drawn *= (2.0 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            drawn = 1.0 + 0.1 * drawn.abs()
        else:
            drawn *= 0.1
        result[name] = drawn if value.is_floating_point() else torch.zeros_like(value, device="cpu")
    return result


def test_made_weights_give_the_recorded_numbers() -> None:
    """Recorded from torch-fidelity 0.4.0's own network with the same weights and image, padding, pooling and all."""
    with torch.device("meta"):
        network = Inception().eval()
    network.load_state_dict(made(network.state_dict()), assign=True)
    ramp = torch.arange(3 * 299 * 299).view(1, 3, 299, 299) % 251
    with torch.no_grad():
        features = network((ramp - 128.0) / 128.0)
        logits = logits_without_bias(network, features)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    # Other processors add in another order.
    torch.testing.assert_close(features[0, ::256], torch.tensor(RECORDED_FEATURES), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[0, ::144], torch.tensor(RECORDED_LOGITS), rtol=1e-3, atol=1e-4)


def test_tensorflow_looks_at_the_place_without_half_a_pixel() -> None:
    images = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    images[..., 1] = 128
    row = as_tensorflow(images)[0, 0, 17] * 128.0 + 128.0
    # Output pixel i is at 2 i / 299; beyond the last pixel it stays.
    expected = (torch.arange(299.0) * (2 / 299)).clamp_max(1.0) * 128.0
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


def test_rules_differ_in_the_middle_grey_and_in_what_they_blur() -> None:
    grey = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    for rule, value in ((as_tensorflow, 0.0), (as_clean_fid, 0.0), (as_pytorch_fid, 2 * 128 / 255 - 1)):
        assert rule(grey).shape == (1, 3, 299, 299)
        torch.testing.assert_close(rule(grey), torch.full((1, 3, 299, 299), value), rtol=0, atol=1e-5)
    lines = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    lines[..., ::2] = 255  # every second column: only an antialiased image of half the size is grey
    assert torch.equal(as_tensorflow(lines), torch.full((1, 3, 299, 299), 127 / 128))
    assert as_clean_fid(lines)[..., 5:-5].abs().max() < 0.05


@pytest.mark.parametrize("rule", [as_tensorflow, as_clean_fid, as_pytorch_fid])
def test_images_of_299_pixels_are_not_resampled(rule) -> None:
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels = rule(images) * 128.0 + 128.0 if rule is not as_pytorch_fid else (rule(images) + 1.0) * 127.5
    torch.testing.assert_close(levels, images.float(), rtol=0, atol=1e-3)


def test_overshoot_of_the_bicubic_is_clipped() -> None:
    edge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255
    x = as_clean_fid(edge)
    assert (x.min(), x.max()) == (-1.0, 127 / 128)
