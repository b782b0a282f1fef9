"""Networks that compute features of images: a TorchScript file, or the small classifier trained on demand.

The third one is in `lite0`.
"""

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

from data.shards.decode import decode_into
from data.shards.reader import EncodedSample
from data.storage.errors import UserError
from models.shapes import Uint8Image
from trainer.config.sections import JudgeKind
from trainer.evaluate.classifier import TrainedClassifier

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


class ClassifierNetwork:
    """The built-in classifier."""

    kind: JudgeKind = "classifier"

    def __init__(self, classifier: TrainedClassifier, seed: int) -> None:
        self._classifier = classifier
        self.name = f"built-in classifier (seed {seed})"
        digest = hashlib.sha256()
        for value in classifier.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.key = digest.hexdigest()

    def __call__(self, images: Uint8Image) -> Seen:
        """Its 64 features and its logits."""
        return Seen(self._classifier.features(images), self._classifier.logits(images))


class ScriptedNetwork:
    """A TorchScript file that takes uint8 images [N, 3, H, W], like the Inception distributed for StyleGAN's metrics.

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
        rgb = images.to(self._device).expand(-1, 3, -1, -1).contiguous()
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
    out = torch.empty(N, H, W, C, dtype=torch.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        stream = io.BytesIO()
        Image.fromarray(image[:, :, 0] if C == 1 else image).save(stream, "JPEG", quality=JPEG_QUALITY)
        decode_into(out[i].numpy(), EncodedSample("samples", str(i), "jpg", stream.getvalue(), None))
    return out.permute(0, 3, 1, 2).contiguous()
