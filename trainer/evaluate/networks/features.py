"""What a network of any kind gives for images; a published one, or one in a TorchScript file; codecs for samples."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.images.shown import PICTURE_CHANNELS
from data.shards.decode import decode_into
from data.shards.reader import EncodedSample
from data.storage.errors import UserError
from models.shapes import Uint8Image
from trainer.config.sections import JudgeKind
from trainer.evaluate.networks.published import Published
from trainer.evaluate.networks.weights import find_weights, load_network

Codec = Literal["none", "png", "jpeg"]
JPEG_QUALITY = 75
"""PIL's default. The authors of DDGAN saved the samples that they measured with it."""


@dataclass(frozen=True)
class Seen:
    """A network's output for some images.

    Attributes:
        features: float32 [N, d], on the CPU.
        logits: class logits [N, k], or None.
    """

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None


class FeatureNetwork(Protocol):
    """Maps uint8 images to features."""

    @property
    def kind(self) -> JudgeKind:
        """Decides what its figures are called."""
        ...

    @property
    def name(self) -> str:
        """Its name in results."""
        ...

    @property
    def key(self) -> str:
        """Hash of its weights."""
        ...

    def __call__(self, images: Uint8Image) -> Seen:
        """Features of one batch."""
        ...


def to_rgb(images: Uint8Image, network: str) -> Uint8Image:
    """Grey images [N, 1, H, W] as RGB [N, 3, H, W], and RGB as it is.

    Raises:
        UserError: they have other channels, which the network does not see.
    """
    refuse_channels(images.shape[1], network)
    return images.expand(-1, 3, -1, -1)


def refuse_channels(num_channels: int, network: str) -> None:
    """Refuse images that a network does not see, unless they are grey or RGB; raises UserError."""
    if num_channels not in PICTURE_CHANNELS:
        raise UserError(
            f"{network} sees grey and RGB images, but these have {num_channels} channels: measure with the network "
            "classifier, which is trained on all channels of a labelled data set, with a TorchScript file that takes "
            "them, or, for pairs, with none (PSNR and SSIM alone)"
        )


class PublishedNetwork:
    """Inception or DINOv2, with the weights that everybody measures with."""

    def __init__(self, published: Published, device: torch.device | str = "cpu") -> None:
        """Find the weights, or fetch them.

        Raises:
            UserError: they are not there and cannot be fetched, or are those of another network.
        """
        weights = find_weights(published.weights)
        self._network = load_network(published.build, weights, device)
        self._published, self._device = published, device
        self.kind: JudgeKind = published.kind
        self.key = hashlib.sha256(f"{weights.sha256} {published.title}".encode()).hexdigest()
        origin = "" if weights.sha256 == published.weights.sha256 else "not the published file, "
        self.name = f"{published.title} ({origin}SHA-256 {weights.sha256[:12]})"

    @torch.no_grad()
    def __call__(self, images: Uint8Image) -> Seen:
        """Features, and logits if it has classes, of uint8 images [N, 1 or 3, H, W]; grey is converted to RGB."""
        rgb = to_rgb(images.to(self._device), self.name)
        features = self._network(self._published.prepare(rgb).to(self._device))
        logits = self._published.logits
        return Seen(features.cpu(), None if logits is None else logits(self._network, features).cpu())


class ScriptedNetwork:
    """A TorchScript file that takes uint8 images [N, 3, H, W], like the Inception distributed for StyleGAN's metrics.

    Images of more channels are given to it as they are, for a network that takes such ones.

    If it accepts `return_features=True`, it returns features [N, d] with that argument and class probabilities without
    it. Otherwise it returns only features.
    """

    kind: JudgeKind = "file"

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Raises:
            UserError: the file is missing or not TorchScript.
        """
        try:
            content = file.read_bytes()
            self._module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the feature network {file} cannot be loaded as TorchScript: {reason}") from None
        self._device = device
        self.key = hashlib.sha256(content).hexdigest()
        self.name = f"{file.name} (SHA-256 {self.key[:12]})"
        self._has_classes = any(a.name == "return_features" for a in self._module.forward.schema.arguments)

    @torch.no_grad()
    def __call__(self, images: Uint8Image) -> Seen:
        """Features; grey images are converted to RGB.

        Raises:
            UserError: the network does not accept such images, or returns no features.
        """
        shown = images.to(self._device)
        rgb = (shown.expand(-1, 3, -1, -1) if shown.shape[1] == 1 else shown).contiguous()
        try:
            features = self._module(rgb, return_features=True) if self._has_classes else self._module(rgb)
            logits = self._module(rgb).float().clamp_min(1e-30).log().cpu() if self._has_classes else None
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the feature network {self.name} fails on images {list(rgb.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise UserError(f"the feature network {self.name} gives no features [N, d] for {len(images)} images")
        return Seen(features.float().cpu(), logits)


def through(codec: Codec) -> Callable[[Uint8Image], Uint8Image]:
    """The function that applies a file format's losses to images: none for PNG (lossless), quality 75 for JPEG."""
    return _through_jpeg if codec == "jpeg" else lambda images: images


def _through_jpeg(images: Uint8Image) -> Uint8Image:
    N, C, H, W = images.shape
    if C not in PICTURE_CHANNELS:
        raise UserError(f"images of {C} channels cannot go through JPEG, which holds grey and RGB: leave it out")
    out = torch.empty(N, H, W, C, dtype=torch.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        stream = io.BytesIO()
        Image.fromarray(image[:, :, 0] if C == 1 else image).save(stream, "JPEG", quality=JPEG_QUALITY)
        decode_into(out[i].numpy(), EncodedSample("samples", str(i), "jpg", stream.getvalue(), None))
    return out.permute(0, 3, 1, 2).contiguous()
