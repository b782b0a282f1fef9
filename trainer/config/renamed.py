"""Settings by the names of former versions: refused in a config, understood in what a run has written."""

from typing import Any

RENAMED = {
    "tracking.sample_interval_steps": "grids.interval_steps",
    "tracking.num_samples": "grids.num_images",
}
"""The present name by the former one; each is SECTION.KEY."""


def rename(values: dict[str, Any]) -> None:
    """Move the settings of a stored config that have a former name to the present one."""
    for former, present in RENAMED.items():
        (section, key), (new_section, new_key) = former.split("."), present.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            values.setdefault(new_section, {})[new_key] = values[section].pop(key)
