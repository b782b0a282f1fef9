"""Former names of settings: refused in a config, accepted in files that a run has written."""

from collections.abc import Callable, Mapping
from typing import Any

RENAMED = {
    "tracking.sample_interval_steps": "grids.interval_steps",
    "tracking.num_samples": "grids.num_images",
    "tracking.backend": "tracking.backends",
}
"""Current names by former name; each is SECTION.KEY."""
GONE = {
    "training.reconstruction.decay_images": "training.reconstruction.weight may have a course instead: "
    "{start: ..., end: 0, decay_images: ...}",
}
"""Settings that have become parts of others, and what to write instead."""
_CONVERTED: dict[str, Callable[[Any], Any]] = {"tracking.backend": lambda name: [] if name == "none" else [name]}
"""Present value from the former one, where it is not the same."""
_HINTS = {"tracking.backend": ", a list; [] is the former none"}


def refusal(former: str) -> str | None:
    """What to set instead of a former setting; None for any other name."""
    if former in GONE:
        return f"{former} is no setting any more: {GONE[former]}"
    if former not in RENAMED:
        return None
    section, key = RENAMED[former].split(".")
    hint = _HINTS.get(former, "")
    return f"{former} is now called {section}.{key}: set {key} in the section {section}{hint}"


def rename(values: dict[str, Any]) -> None:
    """Bring a stored config from former to current settings."""
    _join_weight_and_decay(values)
    for former, present in RENAMED.items():
        (section, key), (new_section, new_key) = former.split("."), present.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            value = values[section].pop(key)
            convert = _CONVERTED.get(former)
            values.setdefault(new_section, {})[new_key] = convert(value) if convert else value


def _join_weight_and_decay(values: dict[str, Any]) -> None:
    """Until decay_images became a part of it, the weight of the reconstruction was a number, which fell to 0."""
    of_run = dict(_section(values, "training", "reconstruction"))
    stages = values.get("stages")
    for place in (values, *(stages.values() if isinstance(stages, dict) else ())):
        own = _section(place, "training", "reconstruction")
        both = {"weight": 0.0, "decay_images": None} | of_run | own
        if own.keys() & {"weight", "decay_images"}:
            weight, images = both["weight"], both["decay_images"]
            own["weight"] = weight if images is None else {"start": weight, "end": 0.0, "decay_images": images}
            own.pop("decay_images", None)


def _section(values: Any, *names: str) -> dict[str, Any]:
    """A section of nested values; an empty one if there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values if isinstance(values, dict) else {}
