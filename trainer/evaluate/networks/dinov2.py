"""DINOv2's ViT-L/14 (2304.07193), in whose features FD-DINOv2 is measured (Stein et al., 2306.04675).

Module names are those of the published state dict, which must fit exactly.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from models.shapes import Uint8Image
from trainer.evaluate.networks.weights import PinnedWeights

IMAGE_SIZE = 224
PATCH_SIZE = 14
TRAINED_GRID = 37
"""Patches in a row of the images of 518 px that the position embedding is for."""
OFFSET = 0.1
"""Added to the grid when the position embedding is scaled: a workaround of the authors that the features depend on."""
LAYER_NORM_EPSILON = 1e-6
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
DINOV2 = PinnedWeights(
    network="dinov2",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    num_bytes=1_217_586_395,
    sha256=DINOV2_SHA256,
)


class DinoV2(nn.Module):
    """The vision transformer, with zeros and random weights.

    Args:
        width: features of a token; 1024 is ViT-L.
        depth: number of blocks.
        num_heads: heads of the attention.
    """

    def __init__(self, width: int = 1024, depth: int = 24, num_heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH_SIZE, stride=PATCH_SIZE)})
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)

    def forward(self, x: Float[Tensor, "b 3 224 224"]) -> Float[Tensor, "b d"]:
        """The normalized class token, float32 [B, width]."""
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self._positions()
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def _positions(self) -> Float[Tensor, "1 n d"]:
        grid = IMAGE_SIZE // PATCH_SIZE
        of_patches = self.pos_embed[:, 1:].unflatten(1, (TRAINED_GRID, TRAINED_GRID)).permute(0, 3, 1, 2)
        scale = (grid + OFFSET) / TRAINED_GRID
        of_patches = F.interpolate(of_patches, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], of_patches.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and a perceptron, each normalized before, scaled by channel, and added."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(width, num_heads)
        self.ls1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = Scale(width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """float32 [B, N, width]."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens)))))


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """float32 [B, N, width]."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """float32 [B, N, width]."""
        return x * self.gamma


def as_dgm_eval(images: Uint8Image) -> Float[Tensor, "b c 224 224"]:
    """The input of FD-DINOv2 as published: Pillow's antialiased bicubic of uint8 to 224 px, normalized as ImageNet."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        for image in images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    ]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255.0
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
