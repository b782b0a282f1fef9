"""Former names of settings: refused in a config, accepted in files that a run has written."""

from typing import Any

RENAMED = {
    "tracking.sample_interval_steps": "grids.interval_steps",
    "tracking.num_samples": "grids.num_images",
}
"""Current names by former name; each is SECTION.KEY."""


def rename(values: dict[str, Any]) -> None:
    """Rename the settings of a stored config from former to current names."""
    for former, present in RENAMED.items():
        (section, key), (new_section, new_key) = former.split("."), present.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            values.setdefault(new_section, {})[new_key] = values[section].pop(key)
