"""Weights of published networks, known by their SHA-256: found in a folder, fetched, or converted from another file."""

import fcntl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data.storage.errors import UserError
from data.storage.files import replaced, sha256_of
from data.storage.location import DataError
from data.storage.paths import user_cache
from data.storage.remote import Storage
from models.networks.build import without_values
from trainer.checkpoint.snapshot import read_state, save_weights

UNUSED = ("num_batches_tracked", "mask_token")
"""Ends of names that only training needs: a file may have them or not."""


@dataclass(frozen=True, kw_only=True)
class PinnedWeights:
    """The file of weights that everybody measures with."""

    network: str
    """Name of the network in messages and of the converted file."""
    url: str
    """Where it is published."""
    num_bytes: int
    """Its size."""
    sha256: str
    """Its SHA-256."""

    @property
    def file_name(self) -> str:
        """Its name at the URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that were found."""

    state: Mapping[str, Tensor]
    """The state dict."""
    sha256: str
    """SHA-256 of the file that they are from, before any conversion."""


def networks_folder() -> Path:
    """Where weights are kept, see `user_cache`."""
    return user_cache("networks")


def converted_file(pinned: PinnedWeights) -> Path:
    """Where `convert_weights` writes."""
    return networks_folder() / f"{pinned.network}.safetensors"


def find_weights(pinned: PinnedWeights) -> Weights:
    """The published file by its hash, under any name, or what `convert_weights` wrote; otherwise it is fetched.

    It is looked for in `networks_folder()` and where torch.hub keeps its downloads, which other FID programs use.

    Raises:
        UserError: it is nowhere and cannot be fetched; the message says which file belongs where.
    """
    if found := _look(pinned):
        return found
    folder = networks_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _look(pinned) or _fetch(pinned, folder)  # another rank may have fetched it meanwhile
    except (DataError, OSError) as error:
        reason = str(error).rpartition(f"{pinned.url}: ")[2]
        raise UserError(
            f"the network {pinned.network} needs weights that could not be fetched: {reason}. Put {pinned.url} "
            f"({pinned.num_bytes / 1e6:.1f} MB, SHA-256 {pinned.sha256}) into {folder}; another form of these weights "
            f"is converted by: {_conversion(pinned, 'FILE')}"
        ) from None


def load_network(build: Callable[[], nn.Module], weights: Weights, device: torch.device | str) -> nn.Module:
    """The network with these weights, float32, in evaluation mode.

    Raises:
        UserError: the weights are of another network.
    """
    with without_values():  # random weights would take seconds, and be thrown away
        network = build()
    network.load_state_dict(_fitting(network, weights.state, "the weights"), assign=True)
    return network.to(device).eval().requires_grad_(False)


def convert_weights(file: Path, pinned: PinnedWeights, build: Callable[[], nn.Module]) -> str:
    """Write a state dict, such as one that was saved again, in the form that `find_weights` reads.

    Args:
        file: .pth, .pt or .safetensors with the published names and shapes, of any floating point type.
        pinned: the published weights that they are taken for; the converted file records the hash of `file`.
        build: the network.

    Returns:
        SHA-256 of `file`.

    Raises:
        UserError: the file cannot be read, or its names or shapes are others.
    """
    with without_values():
        network = build()
    state, sha256 = _fitting(network, read_state(file), str(file)), sha256_of(file)
    networks_folder().mkdir(parents=True, exist_ok=True)
    save_weights(converted_file(pinned), state, {"source_sha256": sha256})
    return sha256


def _look(pinned: PinnedWeights) -> Weights | None:
    for place in (networks_folder(), Path(torch.hub.get_dir()) / "checkpoints"):
        for file in sorted(place.glob("*.pth")):
            if file.stat().st_size == pinned.num_bytes and sha256_of(file) == pinned.sha256:
                return Weights(state=read_state(file), sha256=pinned.sha256)
    if (converted := converted_file(pinned)).is_file():
        state = read_state(converted)
        with safe_open(converted, "pt") as opened:
            metadata = opened.metadata() or {}
        if "source_sha256" not in metadata:
            raise UserError(f"{converted} does not say what it is from: remove it, and convert the weights again")
        return Weights(state=state, sha256=metadata["source_sha256"])
    if (other := networks_folder() / pinned.file_name).is_file():
        raise UserError(
            f"{other} has the SHA-256 {sha256_of(other)}, expected is {pinned.sha256}: it is damaged or another file. "
            f"Remove it, or, if you know what it is, convert it: {_conversion(pinned, str(other))}"
        )
    return None


def _fetch(pinned: PinnedWeights, folder: Path) -> Weights:
    sys.stderr.write(f"trainer.evaluate: fetching {pinned.num_bytes / 1e6:.1f} MB from {pinned.url}\n")
    place, _, name = pinned.url.rpartition("/")
    with replaced(folder / name) as draft:
        Storage(place, attempts=1).download(name, draft)
        if (found := sha256_of(draft)) != pinned.sha256:
            raise DataError(f"{pinned.url} has the SHA-256 {found}, which is not that of the published file")
    return Weights(state=read_state(folder / name), sha256=pinned.sha256)


def _conversion(pinned: PinnedWeights, file: str) -> str:
    return f"python -m trainer.evaluate --convert {file} --network {pinned.network}"


def _fitting(network: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state in float32, complete, for `network`; names in `UNUSED` may be missing or too many."""
    own = network.state_dict()
    for name in sorted(name for name in own.keys() ^ state.keys() if not name.endswith(UNUSED)):
        raise UserError(f"{source}: {name} is {'missing' if name in own else 'unknown'}: these are other weights")
    filled: dict[str, Tensor] = {}
    for name, value in own.items():
        given = state.get(name)
        if given is None:
            given = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        if given.shape != value.shape:
            raise UserError(f"{source}: {name} is {list(given.shape)}, expected is {list(value.shape)}")
        filled[name] = given.to(value.dtype)
    return filled
