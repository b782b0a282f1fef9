"""The README.md of an exported model: what is known of it, and honest blanks for what is not."""

from collections.abc import Mapping
from typing import Any

from trainer.config.train_config import TrainConfig
from trainer.export.programs import GENERATOR, IMAGES

_BLANK = "not stated; fill this in before you publish the model"


def model_card(name: str, config: TrainConfig, step: int, manifest: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
        name: title of the model.
        config: config that builds the generator.
        step: optimizer steps of the weights.
        manifest: that of their checkpoint.
    """
    form, classes = config.image_form, config.data.num_classes
    call = "draw(torch.tensor(seed), torch.arange(64)" + (", label)" if classes else ")")
    colours = "grey" if form.channels == 1 else f"{form.channels} channels"
    facts = {
        "images": f"{form.size} x {form.size} px, {colours}" + (f", {classes} classes" if classes else ""),
        "method": f"{config.training.objective}, {config.diffusion.num_timesteps} steps of denoising",
        "trained": f"{step:,} steps, {manifest['images']:,} images seen, averaged weights",
        "data": f"shards with the digest {manifest['data']}; source and licence {_BLANK}",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(manifest.get("versions", {}).items())),
        "intended use": _BLANK,
    }
    metrics = {name: value for name, value in manifest.get("metrics", {}).items() if "/" not in name}
    return "\n".join(
        [
            f"# {name}",
            "",
            "A generator of a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022). With nothing but PyTorch:",
            "",
            "    import torch",
            f'    draw = torch.export.load("{IMAGES}").module()',
            f"    images = {call}  # uint8 [64, {form.channels}, {form.size}, {form.size}]",
            "",
            "Image i of a seed is always the same, the same as the training program's `trainer.sample` draws on a CPU."
            + (f" `label` is int64 [64], 0 to {classes - 1}." if classes else ""),
            "",
            "| file | what it is |",
            "|---|---|",
            f"| {IMAGES} | maps a seed and numbers of images to the images; random numbers and all steps included |",
            f"| {GENERATOR} | maps x_t, t, z" + (" and label" if classes else "") + " to the network's output |",
            "| generator.safetensors, config.yaml | weights and config for the training program |",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items() if value),
            "",
            "## Last values of the training curves",
            "",
            *([f"- {name}: {value:.4g}" for name, value in sorted(metrics.items())] or ["None are stored."]),
            "",
        ]
    )
