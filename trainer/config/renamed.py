"""Former names of settings: refused in a config, accepted in files that a run has written."""

from collections.abc import Callable
from typing import Any

RENAMED = {
    "tracking.sample_interval_steps": "grids.interval_steps",
    "tracking.num_samples": "grids.num_images",
    "tracking.backend": "tracking.backends",
}
"""Current names by former name; each is SECTION.KEY."""
_CONVERTED: dict[str, Callable[[Any], Any]] = {"tracking.backend": lambda name: [] if name == "none" else [name]}
"""Present value from the former one, where it is not the same."""
_HINTS = {"tracking.backend": ", a list; [] is the former none"}


def refusal(former: str) -> str | None:
    """What to set instead of a former name; None for any other name."""
    if former not in RENAMED:
        return None
    section, key = RENAMED[former].split(".")
    hint = _HINTS.get(former, "")
    return f"{former} is now called {section}.{key}: set {key} in the section {section}{hint}"


def rename(values: dict[str, Any]) -> None:
    """Rename the settings of a stored config from former to current names."""
    for former, present in RENAMED.items():
        (section, key), (new_section, new_key) = former.split("."), present.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            value = values[section].pop(key)
            convert = _CONVERTED.get(former)
            values.setdefault(new_section, {})[new_key] = convert(value) if convert else value
