"""Inception of 2015-12-05, the network that FID, KID and the Inception score are defined with (1706.08500).

It is the network of the TensorFlow graph that the authors of FID published, which torch-fidelity and pytorch-fid
distribute as one state dict for PyTorch. It differs from Inception v3 (1512.00567) in these points: average pooling
leaves out the padding, the last block pools by the maximum, and there are 1008 classes, of which 1000 are used.
Module names are those of the state dict, which must fit exactly.

FID depends on how images are resized to 299 px, so each rule has a name of its own. None of them compresses images.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from models.shapes import Uint8Image
from trainer.evaluate.networks.weights import PinnedWeights

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION = PinnedWeights(
    network="inception",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    num_bytes=95_628_359,
    sha256=INCEPTION_SHA256,
)
Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, int]
"""Channels, kernel, and stride if it is not 1."""


class Inception(nn.Module):
    """The network, with random weights. Use it in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, kernel=3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, kernel=3)
        self.Conv2d_2b_3x3 = Conv(32, 64, kernel=3, padding=(1, 1))
        self.Conv2d_3b_1x1 = Conv(64, 80, kernel=1)
        self.Conv2d_4a_3x3 = Conv(80, 192, kernel=3)
        self.Mixed_5b = Mixed(192, _at_35(), pooled=32)
        self.Mixed_5c = Mixed(256, _at_35(), pooled=64)
        self.Mixed_5d = Mixed(288, _at_35(), pooled=64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]})
        self.Mixed_6b = Mixed(768, _at_17(128), pooled=192)
        self.Mixed_6c = Mixed(768, _at_17(160), pooled=192)
        self.Mixed_6d = Mixed(768, _at_17(160), pooled=192)
        self.Mixed_6e = Mixed(768, _at_17(192), pooled=192)
        long = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": long})
        self.Mixed_7b = Mixed(1280, _at_8(), pooled=192)
        self.Mixed_7c = Mixed(2048, _at_8(), pooled=192, by_maximum=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Float[Tensor, "b 3 299 299"]) -> Float[Tensor, "b d"]:
        """Mean of the last layer over all positions, float32 [B, 2048], of RGB images in about [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))


class Conv(nn.Module):
    """Convolution without bias, batch normalization and ReLU."""

    def __init__(
        self, c_in: int, c_out: int, *, kernel: Kernel, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=BATCH_NORM_EPSILON)

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """float32 [B, C_out, H2, W2]."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        c_in: channels of the input.
        branches: layers of each branch. A list in place of the last layer stands for layers side by side.
        pooled: channels of a last branch, which pools and projects; 0: it only pools, and halves the size.
        by_maximum: how a projected branch pools; by the mean without the padding otherwise.
    """

    def __init__(
        self,
        c_in: int,
        branches: Mapping[str, Sequence[Layer | list[Layer]]],
        *,
        pooled: int = 0,
        by_maximum: bool = False,
    ) -> None:
        super().__init__()
        self._branches: list[list[list[str]]] = []
        for branch, layers in branches.items():
            channels, names = c_in, []
            for number, layer in enumerate(layers, start=1):
                stem = branch if len(layers) == 1 else f"{branch}_{number}"
                beside = layer if isinstance(layer, list) else [layer]
                names.append([stem] if len(beside) == 1 else [f"{stem}{letter}" for letter in "ab"])
                for name, (c_out, kernel, *stride) in zip(names[-1], beside, strict=True):
                    self.add_module(name, _layer(channels, c_out, kernel, *stride))
                channels = beside[0][0]
            self._branches.append(names)
        if pooled:
            self.branch_pool = Conv(c_in, pooled, kernel=1)
        self._projects, self._by_maximum = pooled > 0, by_maximum

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """float32 [B, C_out, H2, W2]."""
        outputs = []
        for names in self._branches:
            y = x
            for beside in names:
                y = torch.cat([self.get_submodule(name)(y) for name in beside], dim=1)
            outputs.append(y)
        if not self._projects:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self._by_maximum:
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _layer(c_in: int, c_out: int, kernel: Kernel, stride: int = 1) -> Conv:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2) if stride == 1 else (0, 0)
    return Conv(c_in, c_out, kernel=kernel, stride=stride, padding=padding)


def _at_35() -> dict[str, list[Layer]]:
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}


def _at_17(c: int) -> dict[str, list[Layer]]:
    wide, high = (1, 7), (7, 1)
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, wide), (192, high)],
        "branch7x7dbl": [(c, 1), (c, high), (c, wide), (c, high), (192, wide)],
    }


def _at_8() -> dict[str, list[Layer | list[Layer]]]:
    pair: list[Layer] = [(384, (1, 3)), (384, (3, 1))]
    return {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), pair], "branch3x3dbl": [(448, 1), (384, 3), pair]}


def logits_without_bias(network: nn.Module, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
    """Logits float32 [B, 1008] of `Inception` as the Inception score (1606.03498) was published: without the bias."""
    return features @ network.get_parameter("fc.weight").T


def as_tensorflow(images: Uint8Image) -> Float[Tensor, "b c 299 299"]:
    """The input of FID as its authors defined it, and as StyleGAN, EDM and torch-fidelity compute it.

    Bilinear as in TensorFlow 1: output pixel i looks at i * H / 299, without half a pixel, and nothing is antialiased.
    Then (x - 128) / 128.
    """
    x = images.float()
    for dim in (3, 2):
        size = x.shape[dim]
        position = torch.arange(IMAGE_SIZE, dtype=torch.float32, device=x.device) * (size / IMAGE_SIZE)
        low = position.long()
        before, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
        x = before + (after - before) * (position - low).view((-1,) + (1,) * (3 - dim))
    return (x - 128.0) / 128.0


def as_pytorch_fid(images: Uint8Image) -> Float[Tensor, "b c 299 299"]:
    """The input of pytorch-fid, which the authors of DDGAN measured with: PyTorch's bilinear, then 2 x / 255 - 1."""
    x = F.interpolate(images.float() / 255.0, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    return 2.0 * x - 1.0


def as_clean_fid(images: Uint8Image) -> Float[Tensor, "b c 299 299"]:
    """The input of clean-fid (2104.11222): Pillow's antialiased bicubic of floats, unrounded, then (x - 128) / 128."""
    planes = images.cpu().flatten(0, 1).float().numpy()
    resized = [
        np.asarray(Image.fromarray(plane).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    x = torch.from_numpy(np.stack(resized).clip(0.0, 255.0)).unflatten(0, images.shape[:2])
    return (x - 128.0) / 128.0
