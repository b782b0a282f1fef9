"""Snapshots: an averaged generator alone, as safetensors, with the config that builds it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.storage.errors import UserError
from data.storage.files import replaced
from models.generator import Generator
from models.networks import build
from models.networks.mlp import MlpGenerator
from models.published.state_dict import load_published
from trainer.algorithm.methods import make_method
from trainer.config.io import load_stored, shown_config
from trainer.config.train_config import TrainConfig

WEIGHTS, DISCRIMINATOR, CONFIG = "generator.safetensors", "discriminator.safetensors", "config.yaml"


class WeightsError(UserError):
    """A weights file cannot be used; says which, why, and what is allowed."""


def build_generator(config: TrainConfig, device: torch.device | str = "cpu") -> Generator | MlpGenerator:
    """The generator of `config` with fresh weights."""
    with torch.device(device):
        return build.build_generator(config.generator, config.network_form, config.noise_levels)


def save_snapshot(
    folder: Path,
    state: Mapping[str, Tensor],
    config: TrainConfig,
    step: int,
    discriminator: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the averaged weights and the config to `folder`; each file appears complete or not at all.

    Args:
        folder: where to; it is made if it is not there.
        state: of the generator.
        config: builds the networks.
        step: optimizer steps of the weights.
        discriminator: its state, for those who train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, state, {"step": str(step)})
    if discriminator is not None:
        save_weights(folder / DISCRIMINATOR, discriminator, {"step": str(step)})
    save_config(folder, config)
    return folder


def save_weights(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors; the file appears complete or not at all. Raises OSError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replaced(file) as draft:
        try:
            save_file(tensors, draft, metadata=dict(metadata))
        except SafetensorError as error:  # its way to say that the disk is full
            raise _as_os_error(error, file) from None


def _as_os_error(error: SafetensorError, file: Path) -> OSError:
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(file)) if found else OSError(f"{file}: {error}")


def save_config(folder: Path, config: TrainConfig) -> None:
    """Write the config that builds the generator of weights in `folder`."""
    with replaced(folder / CONFIG) as draft:
        draft.write_text(shown_config(config), encoding="utf-8")  # snapshots are shared with others


def averages_folder(run: Path) -> Path:
    """Where a run keeps its averages."""
    return run / "averages"


def save_average(
    folder: Path, state: Mapping[str, Tensor], config: TrainConfig, width: float, *, first_step: int, step: int
) -> None:
    """Write an average by a power function, and its config; each file appears complete or not at all.

    Args:
        folder: of the step.
        state: the generator's whole state.
        config: builds the generator.
        width: of the power function.
        first_step: step of the run with which the stage began.
        step: last step of the run that it covers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, config)
    metadata = {"width": f"{width:g}", "first_step": str(first_step), "step": str(step)}
    save_weights(folder / f"width-{width:g}.safetensors", state, metadata)


def is_snapshot(folder: Path) -> bool:
    """Whether `save_snapshot` wrote this folder."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def step_of_snapshot(folder: Path) -> int | None:
    """The step of a snapshot's weights, None if it is unknown."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def load_snapshot(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, TrainConfig]:
    """The averaged generator of a snapshot, and its config.

    Raises:
        WeightsError: the weights cannot be read or do not match the config.
    """
    config = load_stored(folder / CONFIG)
    generator = build_generator(config, device)
    load_initial_weights(generator, folder / WEIGHTS)
    return generator, config


def knows_no_latent(file: Path) -> bool:
    """Whether these are the weights of a snapshot whose z was always zero in training."""
    return file.with_name(CONFIG).is_file() and not trains_with_latent(load_stored(file.with_name(CONFIG)))


def trains_with_latent(config: TrainConfig) -> bool:
    """Whether the generator of a config gets a random z; otherwise it gets zeros."""
    return config.generator.latent and make_method(config.training, config.generator).uses_latent


def load_initial_weights(network: nn.Module, file: Path, part: str = "generator") -> None:
    """Initialize a network from a snapshot's safetensors, or a generator from a published state dict (.pth, .pt).

    Args:
        network: built from this run's config.
        file: weights with our names (safetensors) or with the published names, with or without `module.`.
        part: what messages call the network.

    Raises:
        WeightsError: the file cannot be read, or its names or shapes do not match the network.
    """
    state = load_weights(file)
    if any("all_modules." in name for name in state):
        if not isinstance(network, Generator):
            raise WeightsError(f"{file} holds published weights, which are of a U-Net: set generator.kind to unet")
        try:
            load_published(network, state)
        except ValueError as error:
            raise WeightsError(f"{file}: {error}") from error
        return
    load_matching(network, state, str(file), part)


def load_weights(file: Path) -> Mapping[str, Tensor]:
    """Read a state dict of floating point numbers, see `read_state`.

    Raises:
        WeightsError: the file cannot be read, or holds something else.
    """
    state = read_state(file)
    for name, value in state.items():
        if not value.is_floating_point():
            raise WeightsError(f"{file}: {name} is {value.dtype}, but weights are floating point numbers")
    return state


def read_state(file: Path) -> Mapping[str, Tensor]:
    """Read a state dict from a .safetensors, .pth or .pt file; nothing in it is executed.

    Raises:
        WeightsError: the file cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        elif file.suffix in (".pth", ".pt"):
            if is_zipfile(file) and (damaged := ZipFile(file).testzip()):  # torch does not look at the checksums
                raise WeightsError(f"{file} is damaged: {damaged} in it differs from its checksum")
            state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise WeightsError(f"{file}: unknown kind of weights; allowed: .safetensors, .pth, .pt")
    except WeightsError:
        raise
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # with weights_only, torch raises pickle.UnpicklingError and others
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{file} is refused: it holds more than tensors ({reason})") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{file} holds no state dict: a mapping from names to tensors is expected")
    return state


def load_matching(network: nn.Module, state: Mapping[str, Tensor], source: str, part: str) -> None:
    """Load a state whose names and shapes must be those of the network.

    Args:
        network: built from this run's config.
        state: its future state.
        source: where the state comes from.
        part: what messages call the network.

    Raises:
        WeightsError: a name or a shape differs.
    """
    own = network.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        where = "is missing" if name in own else f"is not in this run's {part}"
        raise WeightsError(f"{source}: {name} {where}; init_from needs the weights of a {part} with the same config")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise WeightsError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, this run's {part} {tuple(parameter.shape)}"
            )
    network.load_state_dict(state)
