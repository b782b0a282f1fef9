"""Runs in the Haar domain: what the networks see, what is drawn, and an exact resume."""

from pathlib import Path

import pytest
import torch

from data.prepare import command as prepare
from models.diffusion import Diffusion
from models.wavelets import haar
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.config.io import load_config
from trainer.plan.cost import count_costs
from trainer.sample.draw import draw_batch, sample_run

HAAR = ("data.image_size=16", "data.domain=haar", "training.reconstruction.weight=1", "training.total_images=96")


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory) -> tuple[str, ...]:
    """Settings of a tiny run of coefficients, with its data of 16 px."""
    folder = tmp_path_factory.mktemp("haar") / "digits"
    assert prepare.main(["digits", "--out", str(folder), "--size", "16", "--workers", "1"]) == 0
    return (*tiny, *HAAR, f"data.path={folder}")


def test_the_networks_see_coefficients_and_images_are_drawn(sets, tmp_path):
    outcome, _ = train(config := configure(sets, tmp_path))
    assert outcome.finished
    saved = state_of(tmp_path, 6)
    of_d = next(x for name, x in saved.items() if name.endswith("discriminator/parameter/conv_in.weight"))
    assert of_d.numel() == 8 * config.discriminator.base_channels * 2
    images = sample_run(Path(tmp_path), 5, 0)
    assert (images.shape, images.dtype) == ((5, 1, 16, 16), torch.uint8)


def test_a_stopped_run_ends_as_an_undisturbed_one(sets, tmp_path):
    train(configure(sets, tmp_path / "whole"))
    train(configure(sets, tmp_path / "stopped"), Stopper(at=3))
    assert train(configure(sets, tmp_path / "stopped"))[0].finished
    assert_same_state(state_of(tmp_path / "stopped", 6), state_of(tmp_path / "whole", 6))


def test_the_image_of_the_predicted_coefficients_is_drawn(sets, tmp_path):
    config = configure(sets, tmp_path)
    levels = torch.randint(0, 256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x0 = haar(levels.float() / 127.5 - 1)
    drawn = draw_batch(lambda *_, **__: x0, Diffusion.from_config(config.diffusion), config, 0, torch.arange(3), None)
    assert torch.equal(drawn, levels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsun256", "celebahq256"])
def test_a_step_costs_less_than_half(name):
    """WaveDiff states 2.5 times fewer multiply-adds for its generator."""
    pixels, coefficients = load_config(name), load_config(f"{name}-haar")
    of_pixels, of_coefficients = (count_costs(config) for config in (pixels, coefficients))
    assert of_pixels.forward_g > 2.3 * of_coefficients.forward_g
    assert of_pixels.forward_d > 2.3 * of_coefficients.forward_d
