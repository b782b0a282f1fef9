"""CIFAR-10, MNIST and Fashion-MNIST by name: fetched from where they are published, and verified by their SHA-256."""

from pathlib import Path
from typing import NamedTuple

from data.fetch.downloads import Report, download, downloads_folder, locked, no_report
from data.storage.errors import UserError
from data.storage.files import sha256_of
from data.storage.location import DataError
from data.storage.remote_folder import RemoteFile, RemoteFolder

_ATTEMPTS = 2
"""Fewer than usual: without a network the message should come soon, and what has arrived stays."""


class KnownFile(NamedTuple):
    """A published file."""

    name: str
    num_bytes: int
    sha256: str


class KnownSet(NamedTuple):
    """Where a data set is published."""

    url: str
    files: tuple[KnownFile, ...]


def _mnist(url: str, *files: tuple[int, str]) -> KnownSet:
    """Size and SHA-256 of the four files of MNIST's form."""
    names = (
        f"{part}-ubyte.gz"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    return KnownSet(url, tuple(KnownFile(name, *file) for name, file in zip(names, files, strict=True)))


KNOWN = {
    # SHA-256: keras/src/datasets/cifar10.py of Keras. The authors publish the MD5 c58f30108f718f92721af3b95e74349a.
    "cifar10": KnownSet(
        "https://www.cs.toronto.edu/~kriz",
        (
            KnownFile(
                "cifar-10-python.tar.gz",
                170_498_071,
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
    ),
    # SHA-256 and place: tensorflow_datasets/url_checksums/mnist.txt of TensorFlow Datasets.
    "mnist": _mnist(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    # SHA-256: url_checksums/fashion_mnist.txt of TensorFlow Datasets. Place: the authors' page, with the MD5
    # 8d4fb7e6c68d591d4c3dfef9ec88bf0d, 25c81989df183df01b3e8a0aad5dffbe, bef4ecab320f06d8554ea6380940ec79 and
    # bb300cfdad3c16e7a12a480ee83cd310.
    "fashionmnist": _mnist(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
}
"""The published files of each data set, by the name that a user gives."""


def fetch_known(name: str, report: Report = no_report) -> Path:
    """The folder of a known data set; files that are missing there are fetched.

    Args:
        name: of `KNOWN`.
        report: is told the progress.

    Raises:
        UserError: a file is damaged, or cannot be fetched; the message says which file belongs where.
    """
    known, folder = KNOWN[name], downloads_folder() / name
    missing: list[KnownFile] = []
    try:
        with locked(folder):
            missing = [file for file in known.files if not _is_there(folder, file)]
            storage = RemoteFolder(known.url, attempts=_ATTEMPTS)
            for file in list(missing):
                remote = RemoteFile(file.num_bytes, "")
                download(storage, file.name, folder / file.name, remote=remote, sha256=file.sha256, report=report)
                missing.remove(file)
    except DataError as error:
        files = "; ".join(
            f"{known.url}/{file.name} ({file.num_bytes} bytes, SHA-256 {file.sha256})" for file in missing
        )
        raise UserError(
            f"source {name}: could not be fetched: {error}. Without a network, get elsewhere and put into {folder}: "
            f"{files}"
        ) from None
    except OSError as error:
        raise UserError(
            f"source {name}: cannot be kept in {folder}: {error.strerror or error}; free some space, or set "
            "XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _is_there(folder: Path, file: KnownFile) -> bool:
    place = folder / file.name
    if not place.exists():
        return False
    if place.stat().st_size != file.num_bytes or sha256_of(place) != file.sha256:
        raise UserError(
            f"{place} is damaged or another file: it has {place.stat().st_size} bytes, expected are {file.num_bytes} "
            f"with the SHA-256 {file.sha256}; remove it"
        )
    return True
