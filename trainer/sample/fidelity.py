"""How close results of a model that translates are to the images that they should be: PSNR and SSIM."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
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
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, targets: Uint8Image, results: UInt8[Tensor, "b n c h w"], conditions: Uint8Image) -> None:
        """Take in pairs.

        Args:
            targets: their images, uint8 [B, C, H, W].
            results: what was drawn for each.
            conditions: what was given, uint8 [B, K, H, W]; compared as well where it has the channels of an image.
        """
        num, levels, wanted = results.shape[1], results.float(), targets.float()
        compared = {"a result": (levels.flatten(0, 1), wanted.repeat_interleave(num, dim=0))}
        if num > 1:
            compared["the mean of its results"] = levels.mean(dim=1), wanted
        if conditions.shape == targets.shape:
            compared["what was given"] = conditions.float(), wanted
        for name, (images, theirs) in compared.items():
            for i, values in enumerate(psnr_and_ssim(images, theirs)):
                self._sums[name][i] += values.double().sum().item() * len(targets) / len(images)
        self.num_images += len(targets)

    def state(self) -> tuple[int, dict[str, list[float]]]:
        """What a rank sends to the others."""
        return self.num_images, dict(self._sums)

    @classmethod
    def joined(cls, states: Sequence[tuple[int, Mapping[str, Sequence[float]]]]) -> "Fidelity":
        """Over the pairs of all ranks, from the `state` of each."""
        whole = cls()
        for num_images, sums in states:
            whole.num_images += num_images
            for name, values in sums.items():
                whole._sums[name] = [a + b for a, b in zip(whole._sums[name], values, strict=True)]
        return whole

    def figures(self) -> dict[str, tuple[float, float]]:
        """Mean PSNR in dB and mean SSIM over the pairs, by what was compared."""
        return {name: (psnr / self.num_images, ssim / self.num_images) for name, (psnr, ssim) in self._sums.items()}

    def table(self) -> str:
        """The figures, a line for each."""
        lines = [f"{f'means over {self.num_images} pairs':<34}{'PSNR, dB':>10}{'SSIM':>10}"]
        lines += [f"{name:<34}{psnr:>10.2f}{ssim:>10.4f}" for name, (psnr, ssim) in self.figures().items()]
        return "\n".join(lines)

    def named(self) -> dict[str, float]:
        """Figures of the results for JSON: psnr_db and ssim, and psnr_db_given and ssim_given of what was given."""
        names = {"a result": "", "what was given": "_given"}
        found: dict[str, float] = {}
        for name, (psnr, ssim) in self.figures().items():
            if name in names:
                found |= {f"psnr_db{names[name]}": psnr, f"ssim{names[name]}": ssim}
        return found
