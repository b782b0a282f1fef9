"""The forms that a model is exported in: what each writes, what it needs, and what its card says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data.images.shown import PICTURE_CHANNELS
from models.diffusion import Diffusion
from trainer.config.train_config import TrainConfig
from trainer.export import diffusers_folder, onnx_graphs, programs

Write = Callable[[Path, nn.Module, Diffusion, TrainConfig], None]


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        write: writes it into a folder that exists: from the averaged generator in evaluation mode, its tables, and its
            config.
        check: refuses what cannot be written, before any work is done.
        describe: the form's paragraph in the card.
        files: names of its files, and what each one is.
    """

    write: Write
    check: Callable[[TrainConfig], None]
    describe: Callable[[TrainConfig], str]
    files: Callable[[TrainConfig], dict[str, str]]


def _torch_text(config: TrainConfig) -> str:
    form, classes, given = config.image_form, config.data.num_classes, config.data.condition_channels
    more = (", label" if classes else "") + (", condition=condition" if given else "")
    call = f"draw(torch.tensor(seed), torch.arange(64){more})"
    text = f"""With nothing but PyTorch:

    import torch
    draw = torch.export.load("{programs.IMAGES}").module()
    images = {call}  # uint8 [64, {form.channels}, {form.size}, {form.size}]

Image i of a seed is always the same, the same as the training program's `{_command(config)}` draws on a CPU."""
    text += f" `label` is int64 [64], 0 to {classes - 1}." if classes else ""
    return text + (f" `condition` is uint8 [64, {given}, {form.size}, {form.size}]." if given else "")


def _command(config: TrainConfig) -> str:
    """The command of the training program that draws the same."""
    return "trainer.translate" if config.data.condition_channels else "trainer.sample"


def _torch_files(config: TrainConfig) -> dict[str, str]:
    images = "maps a seed and numbers of images to the images; random numbers and all steps included"
    return {programs.IMAGES: images, programs.GENERATOR: f"maps {_inputs('x_t, t, z', config)} to the network's output"}


def _inputs(names: str, config: TrainConfig) -> str:
    """Names of inputs, with those that only some models have."""
    more = {"label": config.data.num_classes, "condition": config.data.condition_channels}
    return ", ".join([names, *(name for name, number in more.items() if number)])


def _diffusers_text(config: TrainConfig) -> str:
    labels = f", labels={[0, 1][: config.data.num_classes]}" if config.data.num_classes else ""
    size, given = config.data.image_size, config.data.condition_channels
    arrays = "" if config.data.image_channels in PICTURE_CHANNELS else ', output_type="np"'
    call = f"num_images=16, seed=0{labels}{arrays}"
    what = f"Image i of a seed is that of\n`{_command(config)}`, pixel for pixel in float32 on a CPU."
    if given:
        call = f"conditions=conditions, num_images=4, seed=0{labels}{arrays}"
        kinds = f"numpy arrays of uint8 [{size}, {size}, {given}]"
        if given in (1, 3):
            kinds = f"PIL images, which are cropped and resized as in training, or {kinds}"
        what += f" It is uint8 [{size}, {size}, {config.data.image_channels}]." if arrays else ""
        what += f"\n\n`conditions` is a list of what is translated, 4 images each: {kinds}."
    return f"""With [diffusers](https://huggingface.co/docs/diffusers):

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)
    images = pipeline({call}).images

`trust_remote_code` runs the three Python files of this folder; read them first. {what}"""


def _diffusers_files(_: TrainConfig) -> dict[str, str]:
    return {
        f"model_index.json, {diffusers_folder.PIPELINE}": "the pipeline of diffusers",
        f"{diffusers_folder.GENERATOR}/, {diffusers_folder.SCHEDULER}/": "its parts: configs, weights and code",
    }


def _onnx_text(config: TrainConfig) -> str:
    form, steps, latent = config.network_form, config.diffusion.num_timesteps, config.generator.latent_dim
    shape = ", ".join(map(str, form.shape))
    inputs = {"noise_T": f"[B, {shape}]", "z": f"[B, {steps}, {latent}]", "noise": f"[B, {steps}, {shape}]"}
    lines = [f'        "{name}": standard_normal({shape}),' for name, shape in inputs.items()]
    lines += [f'        "label": int64 [B], 0 to {form.num_classes - 1},'] if form.num_classes else []
    if given := config.data.condition_channels:
        size = config.data.image_size
        lines.append(f'        "condition": float32 [B, {given}, {size}, {size}] in [-1, 1],')
    inside = "\n".join(lines)
    return f"""With any runtime of ONNX, such as onnxruntime:

    session = onnxruntime.InferenceSession("{onnx_graphs.LOOP}")
    (images,) = session.run(None, {{
{inside}
    }})  # float32 [B, {config.image_form.channels}, {config.image_form.size}, {config.image_form.size}] in [-1, 1]

B is any number. Its output was compared with PyTorch's on {onnx_graphs.CHECKED_IMAGES} images: no pixel differs by more
than {onnx_graphs.MAX_DIFFERENCE:g}."""


def _onnx_files(config: TrainConfig) -> dict[str, str]:
    return {
        onnx_graphs.LOOP: f"maps {_inputs('noise', config)} to images: all steps",
        onnx_graphs.GENERATOR: f"maps {_inputs('x_t, t, z', config)} to the network's output",
    }


def _safetensors_text(_: TrainConfig) -> str:
    return """The weights alone, by their names in the training program, which takes this folder as `--run` and as
`--init-from`."""


FORMS = {
    "safetensors": Form(lambda *_: None, lambda _: None, _safetensors_text, lambda _: {}),
    "torch": Form(programs.write_programs, programs.check_exportable, _torch_text, _torch_files),
    "diffusers": Form(
        diffusers_folder.write_diffusers, diffusers_folder.check_exportable, _diffusers_text, _diffusers_files
    ),
    "onnx": Form(onnx_graphs.write_onnx, onnx_graphs.check_exportable, _onnx_text, _onnx_files),
}
"""By the name that the command knows. Weights and config as safetensors and YAML come with every form, and are all of
the first one."""
