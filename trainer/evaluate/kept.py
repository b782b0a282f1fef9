"""Features of a reference in files: in the user's cache, or beside a prepared data set; and statistics of any origin.

A file of the cache is named by a hash of the data and of the network, so that it can never be mistaken for another. A
file beside the data has both hashes in it, and the statistics that other FID programs read.
"""

import logging
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from data.storage.errors import UserError
from data.storage.files import replaced
from data.storage.paths import user_cache
from trainer.evaluate.networks.features import FeatureNetwork
from trainer.evaluate.quality import Features, Statistics, statistics_of

log = logging.getLogger(__name__)
DAMAGED = (OSError, ValueError, EOFError, KeyError, BadZipFile)
"""What reading a damaged .npz raises."""


def cache_folder() -> Path:
    """Where references are cached, see `user_cache`."""
    return user_cache("references")


def load_cached(file: Path) -> Features | None:
    """Features in a file of the cache; None if it is missing or was cut short by a full disk."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return torch.from_numpy(archive["features"])
    except DAMAGED:
        return None


def keep_cached(file: Path, features: Features) -> None:
    """Cache features; if that is not possible, they are computed again the next time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as draft, draft.open("wb") as stream:
            np.savez(stream, features=features.numpy())


def statistics_file(data: Path, network: FeatureNetwork) -> Path:
    """Where a prepared data set keeps its features and statistics by a network."""
    return data / f"statistics-{network.kind}-{network.key[:12]}.npz"


def load_beside(data: Path, digest: str, network: FeatureNetwork) -> Features | None:
    """The features that `keep_beside` wrote; None if there are none. If they cannot be used, a line says why.

    Args:
        data: folder of a prepared data set.
        digest: of its index.
        network: whose features they must be.
    """
    file = statistics_file(data, network)
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            stated = str(archive["data_sha256"]), str(archive["network_sha256"])
            if stated == (digest, network.key):
                return torch.from_numpy(archive["features"])
        wrong = "is of other images" if stated[0] != digest else "is of another network"
    except DAMAGED:
        wrong = "is damaged"
    log.warning("%s %s, and is not used: python -m trainer.evaluate --statistics writes it again", file, wrong)
    return None


def keep_beside(data: Path, digest: str, network: FeatureNetwork, features: Features) -> Path:
    """Keep features with the data: `features`, `mu`, `sigma`, `num_images` and the hashes of data and network.

    Args:
        data: folder of a prepared data set.
        digest: of its index.
        network: whose features they are.
        features: of all its images.

    Returns:
        The file, which appears complete or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    file, statistics = statistics_file(data, network), statistics_of(features)
    with replaced(file) as draft, draft.open("wb") as stream:
        np.savez(
            stream,
            features=features.numpy(),
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            num_images=len(features),
            data_sha256=digest,
            network_sha256=network.key,
        )
    return file


def load_statistics(file: Path) -> Statistics | None:
    """Statistics from an .npz with `mu` and `sigma`; None for other contents, which may be images.

    Raises:
        UserError: `mu` and `sigma` do not fit each other.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                return None
            mean, covariance = torch.from_numpy(archive["mu"]).double(), torch.from_numpy(archive["sigma"]).double()
            count = int(archive["num_images"]) if "num_images" in archive.files else 0
    except DAMAGED:
        return None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{file}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit each other")
    return Statistics(mean=mean, covariance=covariance, num_images=count)
