"""The networks, tables and random numbers that an export carries are those of training, bit for bit."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.storage.errors import UserError
from models.diffusion import Diffusion, noisy, sample_posterior
from trainer.algorithm.randomness import Draws, Purpose
from trainer.checkpoint.snapshot import build_generator
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.export.diffusers_folder import write_diffusers
from trainer.export.forms import FORMS
from trainer.export.portable.ddgan_generator import DDGANGenerator
from trainer.export.portable.ddgan_scheduler import DDGANScheduler
from trainer.export.portable.pipeline import DDGANPipeline, normals
from trainer.sample.conditions import read_condition, translations

NETWORKS = {
    "digits": (),
    "classes": ("data.num_classes=10",),
    "large": ("generator.progressive_input=none", "generator.progressive_output=output_skip"),
    "input skip": ("generator.progressive_input=input_skip",),
    "joined input skip": ("generator.progressive_input=input_skip", "generator.progressive_combine=cat"),
    "one adaptive norm": ("generator.block_type=biggan_oneadagn", "generator.skip_rescale=false"),
    "nearest": ("generator.resample=nearest", "generator.output_tanh=false"),
    "fourier": ("generator.time_embedding=fourier",),
    "noise levels": (
        "generator.time_embedding=log_sigma",
        "generator.sigma_data=0.5",
        "generator.output_tanh=false",
    ),
    "no latent": ("generator.latent=false",),
    "denoiser": ("training.objective=gaussian",),
    "noise": ("training.objective=gaussian", "training.prediction=epsilon", "generator.output_tanh=false"),
    "given": ("data.condition_channels=2",),
    "given input skip": ("data.condition_channels=1", "generator.progressive_input=input_skip"),
    "haar": ("data.domain=haar", "data.image_size=16"),
    "perceptron": ("generator.kind=mlp", "discriminator.kind=mlp"),
    "perceptron of noise levels": (
        "generator.kind=mlp",
        "discriminator.kind=mlp",
        "generator.time_embedding=log_sigma",
    ),
}


def written(config: TrainConfig, folder: Path) -> tuple[torch.nn.Module, Diffusion, DDGANGenerator]:
    """A generator with random weights, its tables, and what diffusers reads of its export."""
    torch.manual_seed(0)
    generator, diffusion = build_generator(config).eval(), Diffusion.from_config(config.diffusion)
    for parameter in generator.parameters():  # also those that start near zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    write_diffusers(folder, generator, diffusion, config)
    read = DDGANGenerator.from_pretrained(folder / "generator", low_cpu_mem_usage=False)
    assert isinstance(read, DDGANGenerator)
    return generator, diffusion, read


def config_of(tiny: tuple[str, ...], name: str) -> TrainConfig:
    return load_config("digits", [*tiny, "run.directory=unused", *NETWORKS[name]])


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_of_an_export_computes_the_same_bits(tiny, tmp_path, name):
    config = config_of(tiny, name)
    generator, diffusion, read = written(config, tmp_path)
    x_t, z = torch.randn(5, *config.network_form.shape), torch.randn(5, config.generator.latent_dim)
    t = torch.arange(5) % diffusion.num_timesteps
    label: tuple[Tensor | None, ...] = (torch.arange(5) * 2,) if config.data.num_classes else ()
    if given := config.network_form.condition_channels:
        label = (None, torch.randn(5, given, *config.network_form.shape[1:]))
    expected = generator(x_t, t, torch.zeros_like(z) if name in ("denoiser", "noise") else z, *label)
    assert torch.equal(read(x_t, t, z, *label).sample, expected)
    assert len(expected.unique()) > 100


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("data.domain=haar", "data.image_size=16", "data.image_channels=5"),
        ("data.num_classes=10", "training.label_dropout=0.1", "training.condition_dropout=0.1"),
    ],
)
def test_the_pipeline_of_an_export_translates_as_the_training_program_does(tiny, tmp_path, more):
    config = load_config("digits", [*tiny, "run.directory=unused", "data.condition_channels=3", *more])
    generator, diffusion, read = written(config, tmp_path)
    scheduler = DDGANScheduler.from_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text())
    pipeline: Any = DDGANPipeline(
        read, scheduler, *(index[name] for name in ("domain", "guidable", "hides_conditions"))
    )
    pipeline.set_progress_bar_config(disable=True)
    size = config.data.image_size
    pixels = torch.randint(0, 256, (23, 3, size, size), dtype=torch.uint8)
    labels, scale = (range(10), 3.0) if config.data.num_classes else (None, 1.0)
    inputs = [(image[None], i % 10 if labels else None) for i, image in enumerate(pixels)]
    loaded = generator, diffusion, config
    with torch.no_grad():
        expected = torch.cat(list(translations(loaded, inputs, num=3, seed=5, guidance=scale)))
    line = {"num_images": 3, "seed": 5, "labels": labels, "guidance_scale": scale, "output_type": "pt"}
    assert torch.equal(pipeline(conditions=list(pixels), **line).images, expected)
    assert len(expected.unique()) > 50
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    assert torch.equal(pipeline(conditions=arrays, **line).images, expected)
    later = pipeline(conditions=pixels[0], **{**line, "num_images": 1}, first=2).images
    assert torch.equal(later, expected[2:3])
    # A picture of another shape and size is cropped and resized as `trainer.translate` does.
    stream = io.BytesIO()
    picture = Image.fromarray(torch.randint(0, 256, (31, 42, 3), dtype=torch.uint8).numpy())
    picture.save(stream, "PNG")
    condition = read_condition(stream.getvalue(), config)
    with torch.no_grad():
        given = [(condition, 0 if labels else None)]
        (expected,) = translations(loaded, given, num=3, seed=5, guidance=scale)
    assert torch.equal(pipeline(conditions=picture, **line).images, expected)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "conditions must be given: this model translates images of 2 channels"),
        ({"conditions": Image.new("L", (8, 8))}, "arrays of 2 channels, but a PIL image has 1 or 3"),
        ({"conditions": []}, "conditions are empty"),
        ({"conditions": np.zeros((8, 8, 2))}, r"expected is uint8 \[2, 8, 8\]"),
        ({"conditions": np.zeros((4, 8, 2), np.uint8)}, r"width \[2, 4, 8\]; expected"),
        ({"conditions": np.zeros((8, 8, 2), np.uint8)}, "labels must be given: this model has the classes 0 to 9"),
        ({"conditions": np.zeros((8, 8, 2), np.uint8), "labels": 1, "guidance_scale": 2.0}, "never saw an image"),
    ],
)
def test_the_pipeline_of_an_export_names_conditions_that_it_cannot_take(tiny, tmp_path, wrong, told):
    config = load_config("digits", [*tiny, "run.directory=x", "data.condition_channels=2", "data.num_classes=10"])
    *_, read = written(config, tmp_path)
    with pytest.raises(ValueError, match=told):
        pipeline: Any = DDGANPipeline(read, DDGANScheduler.from_pretrained(tmp_path / "scheduler"))
        pipeline(**wrong)


def test_images_that_are_no_pictures_are_arrays(tiny, tmp_path):
    config = load_config("digits", [*tiny, "run.directory=x", "data.condition_channels=1", "data.image_channels=5"])
    *_, read = written(config, tmp_path)
    pipeline: Any = DDGANPipeline(read, DDGANScheduler.from_pretrained(tmp_path / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    given = np.zeros((8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match="images of 5 channels are no PIL images: give np or pt"):
        pipeline(conditions=given)
    assert pipeline(conditions=given, output_type="np").images.shape == (1, 8, 8, 5)
    text = FORMS["diffusers"].describe(config)
    assert 'seed=0, output_type="np").images' in text
    assert "uint8 [8, 8, 5]" in text


@torch.no_grad()
@pytest.mark.parametrize("name", ["classes", "noise"])
def test_the_scheduler_of_an_export_takes_the_same_step(tiny, tmp_path, name):
    config = config_of(tiny, name)
    _, diffusion, _ = written(config, tmp_path)
    scheduler = DDGANScheduler.from_pretrained(tmp_path / "scheduler")
    assert isinstance(scheduler, DDGANScheduler)
    x_t, output, noise = torch.randn(3, 4, *config.network_form.shape)
    assert scheduler.timesteps.tolist() == [3, 2, 1, 0]
    for step in scheduler.timesteps.tolist():
        t = torch.full((4,), step)
        if name == "noise":
            of_images = diffusion.sqrt_alpha_bar[step + 1], diffusion.sqrt_one_minus_alpha_bar[step + 1]
            x0_pred = ((x_t - of_images[1] * output) / of_images[0]).clamp(-1, 1)
        else:
            x0_pred = output
        expected = sample_posterior(diffusion, x0_pred, x_t, t, noise)
        assert torch.equal(scheduler.step(output, step, x_t, noise=noise, return_dict=False)[0], expected)
        assert torch.equal(scheduler.add_noise(x_t, noise, t), noisy(diffusion, x_t, t, noise))
    with pytest.raises(ValueError, match="trained for 4 steps"):
        scheduler.set_timesteps(50)


@pytest.mark.parametrize("seed", [0, 3, 2**62 + 5])
def test_the_random_numbers_of_an_export_are_those_of_sampling(seed):
    samples = torch.tensor([0, 7, 2**31])
    for purpose in (Purpose.SAMPLE_NOISE_T, Purpose.SAMPLE_LATENT, Purpose.SAMPLE_NOISE_POSTERIOR):
        for shape in ((3, 4, 4), (7,)):
            expected = Draws(seed, 2, samples).normals(purpose, shape)
            assert torch.equal(normals(seed, 2, samples, int(purpose), shape), expected)


def test_the_folder_names_everything_that_diffusers_looks_for(tiny, tmp_path):
    written(config_of(tiny, "haar"), tmp_path)
    index: dict[str, Any] = json.loads((tmp_path / "model_index.json").read_text())
    assert index["domain"] == "haar"
    for part, text in {"generator": "config.json", "scheduler": "scheduler_config.json"}.items():
        module, name = index[part]
        assert f"class {name}(" in (tmp_path / part / f"{module}.py").read_text()
        assert json.loads((tmp_path / part / text).read_text())["_class_name"] == name
    for file in tmp_path.rglob("*.py"):
        lines = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        roots = {line.split()[1].split(".")[0] for line in lines}
        assert roots <= {
            "collections",
            "dataclasses",
            "itertools",
            "math",
            "typing",
            "numpy",
            "PIL",
            "torch",
            "diffusers",
        }


def test_blocks_that_the_copied_files_do_not_have_are_refused(tiny):
    config = load_config("digits", [*tiny, "run.directory=unused", "generator.resample=haar"])
    with pytest.raises(UserError, match=r"generator\.resample is haar.*export --to torch"):
        FORMS["diffusers"].check(config)
    FORMS["torch"].check(config)
