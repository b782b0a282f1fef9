"""The published networks by the names that `trainer.evaluate --network` takes."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from models.shapes import Uint8Image
from trainer.config.sections import JudgeKind
from trainer.evaluate.networks.dinov2 import DINOV2, DinoV2, as_dgm_eval
from trainer.evaluate.networks.inception import (
    INCEPTION,
    Inception,
    as_clean_fid,
    as_pytorch_fid,
    as_tensorflow,
    logits_without_bias,
)
from trainer.evaluate.networks.weights import PinnedWeights


@dataclass(frozen=True, kw_only=True)
class Published:
    """A network, its weights, and the rule by which images become its input."""

    kind: JudgeKind
    """Decides what its figures are called."""
    title: str
    """Network and rule in results. It is part of the key of kept features: another rule needs another title."""
    weights: PinnedWeights
    """Its weights."""
    build: Callable[[], nn.Module]
    """Makes the network, which maps inputs to features."""
    prepare: Callable[[Uint8Image], Float[Tensor, "b c h w"]]
    """Makes its input from uint8 RGB images [B, 3, H, W]."""
    logits: Callable[[nn.Module, Float[Tensor, "b d"]], Float[Tensor, "b k"]] | None = None
    """Computes logits from the network and its features, for the Inception score; None: the score is not defined."""


PUBLISHED: dict[str, Published] = {
    "inception": Published(
        kind="inception",
        title="Inception of 2015, 299 px by TensorFlow's bilinear",
        weights=INCEPTION,
        build=Inception,
        prepare=as_tensorflow,
        logits=logits_without_bias,
    ),
    "inception-pytorch": Published(
        kind="inception",
        title="Inception of 2015, 299 px by PyTorch's bilinear as in pytorch-fid",
        weights=INCEPTION,
        build=Inception,
        prepare=as_pytorch_fid,
        logits=logits_without_bias,
    ),
    "inception-clean": Published(
        kind="inception-clean",
        title="Inception of 2015, 299 px by Pillow's bicubic as in clean-fid",
        weights=INCEPTION,
        build=Inception,
        prepare=as_clean_fid,
    ),
    "dinov2": Published(
        kind="dinov2",
        title="DINOv2 ViT-L/14, 224 px by Pillow's bicubic",
        weights=DINOV2,
        build=DinoV2,
        prepare=as_dgm_eval,
    ),
}
