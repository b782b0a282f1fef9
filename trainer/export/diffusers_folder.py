"""A generator as a folder that diffusers loads: configs, weights, and the files of `trainer.export.portable`.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` makes the pipeline. Writing needs no diffusers.
"""

import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from data.storage.errors import UserError
from models.diffusion import Diffusion, step_betas
from models.generator import GeneratorConfig
from trainer.algorithm.methods import make_method
from trainer.checkpoint.snapshot import save_weights, trains_with_latent
from trainer.config.train_config import TrainConfig

PIPELINE, GENERATOR, SCHEDULER = "pipeline.py", "generator", "scheduler"
_DIFFUSERS = "0.42.1"
"""Version of the library that the files were written for."""
_OF_TRAINING = {"dropout", "fourier_scale"}
"""Settings of a generator that its weights, or its use for inference, make needless."""


def check_exportable(config: TrainConfig) -> None:
    """Refuse, before any work is done, a model that the copied files do not know.

    Raises:
        UserError: its blocks are of another kind.
    """
    if config.generator.kind != "mlp" and config.generator.resample == "haar":
        raise UserError(
            "generator.resample is haar, whose blocks the form for diffusers does not have: export --to torch"
        )


def write_diffusers(folder: Path, generator: nn.Module, diffusion: Diffusion, config: TrainConfig) -> None:
    """Write model_index.json, pipeline.py, generator/ and scheduler/ into a folder that exists.

    Args:
        folder: where to.
        generator: with the weights to write.
        diffusion: tables, for the noise levels that the generator sees.
        config: builds the generator.
    """
    method, domain = make_method(config.training, config.generator), config.data.domain
    index = {
        "_class_name": ["pipeline", "DDGANPipeline"],
        "_diffusers_version": _DIFFUSERS,
        GENERATOR: ["ddgan_generator", "DDGANGenerator"],
        SCHEDULER: ["ddgan_scheduler", "DDGANScheduler"],
        "domain": domain,
        "guidable": bool(config.training.label_dropout),
        "hides_conditions": bool(config.training.condition_dropout),
    }
    _write_json(folder / "model_index.json", index)
    _copy(PIPELINE, folder)

    part = _part(folder, GENERATOR)
    form = config.network_form
    settings: dict[str, Any] = {
        **{name: getattr(config.generator, name) for name in _settings_of_inference()},
        "latent": trains_with_latent(config),
        "image_size": config.data.image_size,
        "sample_size": form.size,
        "channels": form.channels,
        "num_classes": form.num_classes,
        "condition_channels": form.condition_channels,
        "noise_levels": diffusion.noise_levels.tolist(),
    }
    _write_json(part / "config.json", {"_class_name": "DDGANGenerator", "_diffusers_version": _DIFFUSERS, **settings})
    state = {f"network.{name}": tensor for name, tensor in generator.state_dict().items()}
    save_weights(part / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    _copy("ddgan_generator.py", part)

    part = _part(folder, SCHEDULER)
    settings = {
        "betas": step_betas(config.diffusion).tolist(),
        "prediction_type": {"x0": "sample", "epsilon": "epsilon"}[method.prediction],
    }
    name = {"_class_name": "DDGANScheduler", "_diffusers_version": _DIFFUSERS}
    _write_json(part / "scheduler_config.json", {**name, **settings})
    _copy("ddgan_scheduler.py", part)


def _settings_of_inference() -> list[str]:
    return [name for name in GeneratorConfig.__dataclass_fields__ if name not in _OF_TRAINING]


def _part(folder: Path, name: str) -> Path:
    part = folder / name
    part.mkdir()
    return part


def _copy(name: str, folder: Path) -> None:
    source = files("trainer.export.portable").joinpath(name)
    with source.open("rb") as file, (folder / name).open("wb") as copy:
        shutil.copyfileobj(file, copy)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
