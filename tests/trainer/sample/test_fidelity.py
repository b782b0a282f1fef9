import math

import pytest
import torch

from trainer.sample.fidelity import Fidelity, psnr_and_ssim


def test_psnr_is_that_of_its_definition_and_ssim_of_equal_images_is_1():
    torch.manual_seed(0)
    image = torch.randint(0, 246, (3, 1, 16, 16)).float()
    psnr, ssim = psnr_and_ssim(image + 10.0, image)
    assert psnr.tolist() == pytest.approx([20 * math.log10(255 / 10)] * 3)
    assert psnr_and_ssim(image, image)[1].tolist() == pytest.approx([1.0] * 3)
    assert (ssim < 1).all()


def test_means_are_over_results_and_then_over_pairs_and_a_condition_of_other_channels_is_not_compared():
    fidelity = Fidelity()
    target = torch.full((1, 16, 16), 100, dtype=torch.uint8)
    for error in (4, 8):
        results = torch.stack([target + error, target - error])[None]
        fidelity.add(target[None], results, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    figures = fidelity.figures()
    assert figures.keys() == {"a result", "the mean of its results"}
    assert figures["a result"][0] == pytest.approx((20 * math.log10(255 / 4) + 20 * math.log10(255 / 8)) / 2)
    assert figures["the mean of its results"] == (pytest.approx(10 * math.log10(255**2 * 256)), 1.0)
    assert fidelity.table().splitlines()[0].split() == ["means", "over", "2", "pairs", "PSNR,", "dB", "SSIM"]


def test_ranks_that_share_the_pairs_find_what_one_finds():
    torch.manual_seed(0)
    targets, given = torch.randint(0, 256, (2, 6, 1, 16, 16), dtype=torch.uint8).unbind()
    results = torch.randint(0, 256, (6, 1, 1, 16, 16), dtype=torch.uint8)
    whole, first, second = Fidelity(), Fidelity(), Fidelity()
    whole.add(targets, results, given)
    first.add(targets[:4], results[:4], given[:4])
    second.add(targets[4:], results[4:], given[4:])
    joined = Fidelity.joined([first.state(), second.state()]).named()
    assert joined == {name: pytest.approx(value) for name, value in whole.named().items()}
    assert joined.keys() == {"psnr_db", "ssim", "psnr_db_given", "ssim_given"}
