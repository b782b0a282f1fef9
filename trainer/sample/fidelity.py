"""How close results of a model that translates are to the images that they should be: PSNR and SSIM."""

import math
from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from models.shapes import Uint8Image

MIN_SSIM_SIZE = 6


def psnr_and_ssim(images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    """Peak signal-to-noise ratio in dB and structural similarity (Wang et al., 2004) of each image, [B] each.

    Both by torchmetrics, for levels of 0 to 255; SSIM with its usual Gaussian window of 11 x 11 pixels, NaN for images
    that it does not fit, of less than 6 px. Equal images, whose ratio is infinite, count as if one value were off by
    one level: otherwise a single one would make every mean infinite.

    Args:
        images: to compare.
        targets: what they should be.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ratio = peak_signal_noise_ratio(images, targets, data_range=255.0, reduction="none", dim=(1, 2, 3))
    ratio = ratio.clamp(max=10 * math.log10(255.0**2 * images[0].numel()))
    if min(images.shape[2:]) < MIN_SSIM_SIZE:
        return ratio, torch.full_like(ratio, math.nan)
    ssim = structural_similarity_index_measure(images, targets, data_range=255.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return ratio, ssim


class Fidelity:
    """Sums PSNR and SSIM over pairs.

    Attributes:
        num_images: pairs so far.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.num_images = 0
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, target: Uint8Image, results: Uint8Image, condition: Uint8Image) -> None:
        """Take in a pair.

        Args:
            target: its image, uint8 [C, H, W].
            results: what was drawn, uint8 [N, C, H, W].
            condition: what was given, uint8 [K, H, W]; compared as well where it has the channels of an image.
        """
        levels, wanted = results.float(), target.float()[None]
        compared = {"a result": levels, "the mean of its results": levels.mean(dim=0, keepdim=True)}
        if condition.shape == target.shape:
            compared["what was given"] = condition.float()[None]
        for name, images in compared.items():
            measured = torch.stack(psnr_and_ssim(images, wanted.expand_as(images)))
            self._sums[name].append(measured.double().mean(dim=1))
        self.num_images += 1

    def figures(self) -> dict[str, tuple[float, float]]:
        """Mean PSNR in dB and mean SSIM over the pairs, by what was compared."""
        means = {name: torch.stack(values).mean(dim=0).tolist() for name, values in self._sums.items()}
        return {name: (psnr, ssim) for name, (psnr, ssim) in means.items()}

    def table(self) -> str:
        """The figures, a line for each."""
        lines = [f"{f'means over {self.num_images} pairs':<34}{'PSNR, dB':>10}{'SSIM':>10}"]
        lines += [f"{name:<34}{psnr:>10.2f}{ssim:>10.4f}" for name, (psnr, ssim) in self.figures().items()]
        return "\n".join(lines)
