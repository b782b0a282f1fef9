"""The README.md of an exported model: what is known of it, and honest blanks for what is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config.train_config import TrainConfig
from trainer.export.forms import FORMS

_BLANK = "not stated; fill this in before you publish the model"


@dataclass(frozen=True)
class Facts:
    """What is known of a model besides its config.

    Attributes:
        step: optimizer steps of its weights; None: unknown.
        manifest: of their checkpoint; empty without one.
        source: kind and name of what the data set was prepared from; None: unknown.
        commit: commit of the code that exports; None: unknown.
        figures: cards of `trainer.evaluate --card`.
    """

    step: int | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    commit: str | None = None
    figures: Sequence[Mapping[str, Any]] = ()


def model_card(name: str, config: TrainConfig, facts: Facts, forms: Sequence[str]) -> str:
    """The text of the card, with the header that the Hugging Face Hub reads.

    Args:
        name: title of the model.
        config: config that builds the generator.
        facts: what else is known.
        forms: names of the forms in the folder.
    """
    translates = bool(config.data.condition_channels)
    lines = ["---", f"pipeline_tag: {'image-to-image' if translates else 'unconditional-image-generation'}"]
    lines += ["library_name: diffusers"] if "diffusers" in forms else []
    lines += ["tags:", "- denoising-diffusion-gan", "---", f"# {name}", ""]
    lines += ["A generator of a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022).", ""]
    if translates:
        lines += [f"It translates: each image is drawn for a given one, its condition, {_condition(config)}.", ""]
    files: dict[str, str] = {}
    for form in forms:
        lines += [FORMS[form].describe(config), ""]
        files |= FORMS[form].files(config)
    files["generator.safetensors, config.yaml"] = "weights and config for the training program"
    lines += ["| file | what it is |", "|---|---|", *(f"| {file} | {text} |" for file, text in files.items()), ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in _known(config, facts).items()), ""]
    return "\n".join(lines + _measured(facts))


def _condition(config: TrainConfig) -> str:
    """What a condition of a model that translates is."""
    channels, size = config.data.condition_channels, config.data.image_size
    return f"{_colours(channels)} of 8 bits, the square centre of the given image at {size} x {size} px"


def _colours(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")


def _given_in(source: str | None) -> str:
    """Which part of the source of pairs, pairs:CONDITIONS:IMAGES, the conditions were."""
    kind, *names = (source or "").split(":")
    return f"; in training those of {names[0]}" if kind == "pairs" and len(names) == 2 else ""


def _known(config: TrainConfig, facts: Facts) -> dict[str, str]:
    form, manifest = config.image_form, facts.manifest
    colours = _colours(form.channels)
    classes = f", {form.num_classes} classes" if form.num_classes else ""
    trained = ["averaged weights"]
    if facts.step is not None:
        trained.insert(0, f"{facts.step:,} steps")
    if "images" in manifest:
        trained.insert(1, f"{manifest['images']:,} images seen")
    digest = [f"shards with the digest {manifest['data']}"] if "data" in manifest else []
    source = f"prepared from {facts.source}; its licence: {_BLANK}" if facts.source else f"source and licence {_BLANK}"
    known = {
        "images": f"{form.size} x {form.size} px, {colours}{classes}",
        "condition": _condition(config) + _given_in(facts.source) if form.condition_channels else "",
        "method": f"{config.training.objective}, {config.diffusion.num_timesteps} steps of denoising",
        "trained": ", ".join(trained),
        "data": "; ".join([*digest, source]),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(manifest.get("versions", {}).items())),
        "exported by": f"commit {facts.commit}" if facts.commit else "",
        "licence of the code": "Apache-2.0",
        "licence of the weights": _BLANK,
        "intended use": _BLANK,
    }
    return {key: text for key, text in known.items() if text}


def _measured(facts: Facts) -> list[str]:
    lines = ["## Measured figures", ""]
    for card in facts.figures:
        made = card.get("made", {})
        lines += [f"    {card.get('command', '')}", ""]
        lines += [f"Features of {card['network'].get('name')}; {made.get('device')}, {made.get('date')}.", ""]
        for result in card["results"]:
            where = f" (step {result['step']})" if result.get("step") is not None else ""
            # A figure that could not be measured is null in the card.
            figures = {name: value for name, value in result["figures"].items() if isinstance(value, int | float)}
            lines += [f"- {name}{where}: {value:.4g}" for name, value in sorted(figures.items())]
        lines.append("")
    if not facts.figures:
        lines += ["None are stored. `trainer.evaluate --card` measures them.", ""]
    metrics = {name: value for name, value in facts.manifest.get("metrics", {}).items() if "/" not in name}
    if metrics:
        lines += ["## Last values of the training curves", ""]
        lines += [*(f"- {name}: {value:.4g}" for name, value in sorted(metrics.items())), ""]
    return lines
