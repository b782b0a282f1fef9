"""Draws images with a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022): a pipeline of diffusers.

Image i of a seed is always the same. Its random numbers are a function of (seed, step, i), made by the counter-based
generator Philox4x32-10 (Salmon et al., SC 2011), and images are drawn in batches of one size. A model that translates
draws images for each one that it is given.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

NOISE_T, LATENT, NOISE_POSTERIOR = 11, 12, 13
"""What a random number is used for."""
MASK_32 = 0xFFFFFFFF
Given = Image.Image | np.ndarray | Tensor
"""What is given to a model that translates: a PIL image, or uint8 [H, W] or [H, W, K]; a tensor is [K, H, W]."""


class DDGANPipeline(DiffusionPipeline):
    """Draws images, by class if the model has classes, and for given images if it translates.

    Args:
        generator: a `DDGANGenerator`.
        scheduler: a `DDGANScheduler`.
        domain: what the generator makes: `pixels`, or `haar`, wavelet coefficients of them.
        guidable: whether the model was trained with dropped labels.
        hides_conditions: whether the model was trained with dropped conditions. Guidance needs one of both.
    """

    @register_to_config
    def __init__(
        self,
        generator: torch.nn.Module,
        scheduler: object,
        domain: str = "pixels",
        guidable: bool = False,
        hides_conditions: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(generator=generator, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        seed: int = 0,
        first: int = 0,
        labels: Sequence[int] | int | None = None,
        conditions: Given | Sequence[Given] | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Draw images `first` .. `first + num_images - 1` of a seed.

        Args:
            num_images: how many; with conditions, of each.
            seed: 0 .. 2**63 - 1.
            first: number of the first image, or of the first one of each condition.
            labels: classes, drawn in turn: image i is of `labels[i % len(labels)]`. None: all. An int: one class. With
                conditions, the images of condition i are of `labels[i % len(labels)]`.
            conditions: the images to translate; only and always of a model that translates. PIL images are cropped
                and resized; arrays and tensors have the size of the model, and its number of channels.
            guidance_scale: above 1, images are more typical of their class, or follow their condition more closely;
                needs a model that was trained with dropped labels or conditions.
            output_type: `pil` (of grey and RGB alone), `np` (uint8 [N, H, W, C]) or `pt` (uint8 [N, C, H, W]).
            return_dict: return an object with `images` instead of a tuple.
        """
        config = self.generator.config
        classes = self._classes(labels)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type}; allowed: pil, np, pt")
        if output_type == "pil" and (C := self._channels()) not in (1, 3):
            raise ValueError(f"output_type is pil, but images of {C} channels are no PIL images: give np or pt")
        if guidance_scale != 1 and not (self.config["guidable"] or self.config["hides_conditions"]):
            raise ValueError(
                "guidance_scale is given, but this model never saw an image without its label or condition"
            )
        size = max(1, min(64, 2**18 // config.image_size**2))  # another number would change the order of float sums
        given = self._planes(conditions)
        if given is not None and classes and labels is None:
            raise ValueError(f"labels must be given: this model has the classes 0 to {config.num_classes - 1}")
        if given is None:
            start = first - first % size
            numbers = torch.arange(start, first + num_images)
            turns = numbers
        else:
            start = first
            numbers = torch.arange(first, first + num_images).repeat(len(given))
            turns = torch.arange(len(given)).repeat_interleave(num_images)
        drawn = []
        progress_bar: Any = self.progress_bar
        for begin in progress_bar(range(0, len(numbers), size)):
            # The last batch is as large as the others.
            at = torch.arange(begin, begin + size).clamp(max=len(numbers) - 1)
            samples, turn = numbers[at].to(self.device), turns[at]
            label = torch.tensor(classes)[turn % len(classes)].to(self.device) if classes else None
            condition = None if given is None else self._seen(given[turn])
            drawn.append(self._draw(seed, samples, label, condition, guidance_scale).cpu())
        images: object = torch.cat(drawn)[first - start : len(numbers)]
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()  # type: ignore[attr-defined]
        if output_type == "pil":
            images = self.numpy_to_pil(np.asarray(images, dtype=np.float32) / 255)
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def _channels(self) -> int:
        """Of an image in pixels."""
        return self.generator.config.channels // (4 if self.config["domain"] == "haar" else 1)

    def _classes(self, labels: Sequence[int] | int | None) -> list[int]:
        number = self.generator.config.num_classes
        if labels is None:
            return list(range(number))
        if not number:
            raise ValueError("labels are given, but this model has no classes")
        chosen = [labels] if isinstance(labels, int) else list(labels)
        if not chosen or not all(0 <= label < number for label in chosen):
            raise ValueError(f"labels are {chosen}; allowed: 0 to {number - 1}")
        return chosen

    def _planes(self, conditions: Given | Sequence[Given] | None) -> Tensor | None:
        """What is given, uint8 [N, K, H, W]."""
        config = self.generator.config
        K = config.condition_channels // (4 if self.config["domain"] == "haar" else 1)
        if (conditions is None) != (K == 0):
            raise ValueError(
                f"conditions must be given: this model translates images of {K} channels"
                if K
                else "conditions are given, but this model does not translate"
            )
        if conditions is None:
            return None
        images = [conditions] if isinstance(conditions, Given) else list(conditions)
        if not images:
            raise ValueError("conditions are empty")
        return torch.stack([planes(image, K, config.image_size) for image in images])

    def _seen(self, images: Tensor) -> Tensor:
        """What the generator sees of conditions, uint8 [B, K, H, W]."""
        pixels = images.to(self.device).to(torch.float32) / 127.5 - 1.0
        return haar(pixels) if self.config["domain"] == "haar" else pixels

    def _draw(
        self, seed: int, samples: Tensor, label: Tensor | None, condition: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Images of a seed with these numbers, uint8 [B, C, H, W]."""
        config = self.generator.config
        shape = (config.channels, config.sample_size, config.sample_size)
        dtype = next(self.generator.parameters()).dtype
        x_t = normals(seed, len(self.scheduler), samples, NOISE_T, shape)
        for step in self.scheduler.timesteps.tolist():
            z = normals(seed, step, samples, LATENT, (config.latent_dim,))
            t = torch.full((len(samples),), step, device=samples.device)

            def predict(
                label: Tensor | None, condition: Tensor | None, x_t: Tensor = x_t, t: Tensor = t, z: Tensor = z
            ) -> Tensor:
                seen = None if condition is None else condition.to(dtype)
                output = self.generator(x_t.to(dtype), t, z.to(dtype), label, seen, return_dict=False)[0].float()
                return self.scheduler.predicted_x0(output, int(t[0]), x_t)

            x0_pred = predict(label, condition)
            if guidance_scale != 1:
                no_label, no_condition = label, condition
                if label is not None and self.config["guidable"]:
                    no_label = torch.full_like(label, config.num_classes)
                if condition is not None and self.config["hides_conditions"]:
                    no_condition = torch.zeros_like(condition)
                of_none = predict(no_label, no_condition)
                x0_pred = torch.lerp(of_none, x0_pred, guidance_scale).clamp(-1.0, 1.0)
            noise = normals(seed, step, samples, NOISE_POSTERIOR, shape)
            x_t = self.scheduler.denoised(x0_pred, step, x_t, noise)
        pixels = inverse_haar(x_t) if self.config["domain"] == "haar" else x_t
        return ((pixels.clamp(-1.0, 1.0) + 1.0) * 127.5).nan_to_num(nan=0.0).round().to(torch.uint8)


def planes(image: Given, num_channels: int, size: int) -> Tensor:
    """What is given, uint8 [K, size, size]; PIL images are cropped and resized as the training images were."""
    if isinstance(image, Image.Image):
        if num_channels not in (1, 3):
            raise ValueError(f"this model translates arrays of {num_channels} channels, but a PIL image has 1 or 3")
        bands = image.convert("L" if num_channels == 1 else "RGB").split()
        return torch.stack([torch.from_numpy(np.array(square(band, size))) for band in bands])
    tensor = image if isinstance(image, Tensor) else torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)
    if tensor.dtype != torch.uint8 or tensor.shape != (num_channels, size, size):
        raise ValueError(
            f"a condition is {tensor.dtype} with channels, height and width {list(tensor.shape)}; expected is uint8 "
            f"{[num_channels, size, size]}"
        )
    return tensor.cpu()


def square(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image, at another size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return image.crop(box)
    filtering = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
    return image.resize((size, size), filtering, box=box)


def haar(x: Tensor) -> Tensor:
    """Haar coefficients [B, 4 C, H / 2, W / 2] of an image."""
    p, q, r, s = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    upper, lower, right_upper, right_lower = p + q, r + s, q - p, s - r
    bands = (upper + lower, lower - upper, right_upper + right_lower, right_lower - right_upper)
    return torch.cat(bands, dim=1) / 4


def inverse_haar(y: Tensor) -> Tensor:
    """The image [B, C, 2 H, 2 W] of Haar coefficients [B, 4 C, H, W]."""
    ll, lh, hl, hh = y.chunk(4, dim=1)
    upper, lower, right_upper, right_lower = ll - lh, ll + lh, hl - hh, hl + hh
    rows = [
        torch.stack([mean - right, mean + right], dim=-1).flatten(-2)
        for mean, right in ((upper, right_upper), (lower, right_lower))
    ]
    return torch.stack(rows, dim=-2).flatten(-3, -2)


def normals(seed: int, step: int, samples: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals for samples [B] of a step, float32 [B, *shape], by the Box-Muller transform."""
    count = math.prod(shape)
    num_blocks = -(-count // 4)
    device = samples.device
    counter = (
        torch.arange(num_blocks, device=device)[None],
        samples[:, None],
        torch.full((1, 1), step, device=device),
        torch.full((1, 1), purpose, device=device),
    )
    words = torch.stack(philox(counter, seed & MASK_32, seed >> 32), dim=1)
    uniform = (words[:, 0::2].to(torch.float32) + 1.0) * 2.0**-32  # in (0, 1]
    radius, angle = (uniform.log() * -2.0).sqrt(), words[:, 1::2].to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    values = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1).flatten(1)[:, :count]
    return values.unflatten(1, shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], k0: int, k1: int) -> tuple[Tensor, ...]:
    """Four tensors of uniform 32-bit integers, int64, from four of broadcastable shapes."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # With 2**32 subtracted from the factors, the products fit into int64.
        product_0, product_1 = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        high_0, high_1 = (product_0 >> 32) + c0, (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & MASK_32, high_0 ^ c3 ^ k1, product_0 & MASK_32
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return torch.broadcast_tensors(c0, c1, c2, c3)
