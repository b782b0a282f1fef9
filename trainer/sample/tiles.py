"""Images larger than a model's: it sees tiles that overlap, and its predictions are blended in every step.

All tiles share one noisy image and one latent, so that neighbours agree where they overlap, and nothing is drawn twice
(MultiDiffusion, 2302.08113).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from models.shapes import Image, Latent, Timestep

OVERLAP = 0.5
"""Of neighbouring tiles at least, as a fraction of their side: at a half, the windows of tiles add up to a constant."""


def starts_of_tiles(length: int, size: int) -> list[int]:
    """Where tiles of a size start on a line of a length, at equal distances from one end to the other."""
    rest, stride = length - size, size - int(OVERLAP * size)
    number = -(-rest // stride)
    return [round(i * rest / number) for i in range(number + 1)] if number else [0]


def window(size: int) -> Float[Tensor, "size size"]:
    """Weights of the pixels of a tile: a Hann window, which falls smoothly towards the edges and is nowhere zero."""
    wave = torch.sin((torch.arange(size) + 0.5) * (torch.pi / size)).square()
    return wave[:, None] * wave


def in_tiles(generator: Callable[..., Tensor], size: int, at_once: int) -> Callable[..., Tensor]:
    """A generator of images of one size as one of larger images.

    Args:
        generator: maps (x_t, t, z), and with classes `label`, to an image of the shape of x_t.
        size: height and width of its images, in its domain.
        at_once: tiles of one forward pass; the last one is filled up, as another number changes the order of float
            sums.
    """

    def generate(x_t: Image, t: Timestep, z: Latent, **given: Tensor) -> Image:
        B, _, H, W = x_t.shape
        corners = [(y, x) for y in starts_of_tiles(H, size) for x in starts_of_tiles(W, size)]
        weights, total, weight = window(size).to(x_t), torch.zeros_like(x_t), torch.zeros_like(x_t[0, 0])
        for y, x in corners:
            weight[y : y + size, x : x + size] += weights
        places = [(b, y, x) for b in range(B) for y, x in corners]
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            filled = some + some[-1:] * (at_once - len(some))
            tiles = torch.stack([x_t[b, :, y : y + size, x : x + size] for b, y, x in filled])
            images = torch.tensor([b for b, _, _ in filled], device=x_t.device)
            outputs = generator(tiles, t[images], z[images], **{name: value[images] for name, value in given.items()})
            for (b, y, x), output in zip(some, outputs, strict=False):
                total[b, :, y : y + size, x : x + size] += weights * output
        return total / weight

    return generate
