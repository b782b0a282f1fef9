"""A card: figures in a JSON file, with hashes of all that they follow from, so that others can compute them again."""

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.storage.errors import UserError
from data.storage.files import replaced
from trainer.evaluate.networks.features import FeatureNetwork
from trainer.evaluate.reference import Measured, Reference

FORMAT = 1
TOLERANCE = 1e-4
"""Relative difference of a figure that another processor's order of sums may make; the hashes must be equal."""
SMALL = 1e-6
"""Kernel distances are differences of large means, so below this value they are rounding."""
SETTINGS: dict[str, type] = {
    "run": str,
    "checkpoints": str,
    "num": int,
    "seeds": str,
    "weights": str,
    "samples": str,
    "reference": str,
    "network": str,
    "through": str,
    "seed": int,
    "infinity": bool,
}
"""Options of the command that the figures depend on, and their types in a card. Absent: not given."""
Row = tuple[int | None, int | None, str, Measured]
"""Step, training images, SHA-256 of weights or samples, figures."""


def make_card(
    options: argparse.Namespace, rows: Sequence[Row], reference: Reference, network: FeatureNetwork, device: str
) -> dict[str, Any]:
    """The card of some results, as it is written.

    Args:
        options: of the command.
        rows: the results.
        reference: what was compared with.
        network: whose features were compared.
        device: where they were computed.
    """
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("reference", "network", "through", "seed")}
    if options.run is None:
        settings["samples"] = options.samples
    else:
        settings |= {"run": options.run} | ({"seeds": options.seeds} if options.seeds else {"num": options.num})
        if options.weights != "average":
            settings["weights"] = options.weights
        if steps := [str(row[0]) for row in rows if row[0] is not None]:
            settings["checkpoints"] = ",".join(steps)
    if options.infinity:
        settings["infinity"] = True
    settings = {
        name: str(settings[name]) if kind is str else settings[name]
        for name, kind in SETTINGS.items()
        if name in settings
    }
    return {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", "trainer.evaluate", *_arguments(settings)]),
        "settings": settings,
        "network": {"name": network.name, "sha256": network.key},
        "reference": {"num_images": reference.num_images, "sha256": reference.key},
        "results": [
            {
                "step": step,
                "images": images,
                "samples_sha256" if options.run is None else "weights_sha256": sha256,
                "num_samples": measured.num_samples,
                "figures": measured.figures,
            }
            for step, images, sha256, measured in rows
        ],
        "made": {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        },
    }


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a generator's state: names and float32 values in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_card(file: Path, card: Mapping[str, Any]) -> None:
    """Write a card; the file appears complete or not at all."""
    with replaced(file) as draft:
        draft.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def read_card(file: Path) -> dict[str, Any]:
    """Read a card.

    Raises:
        UserError: the file cannot be read, or is no card that this version knows.
    """
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the card {file} cannot be read: {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise UserError(f"{file} is no card of format {FORMAT}, as trainer.evaluate --card writes it")
    settings, results = card.get("settings"), card.get("results")
    hashes = [card.get(part) for part in ("network", "reference")]
    if not isinstance(settings, dict) or not isinstance(results, list) or not all(isinstance(h, dict) for h in hashes):
        raise UserError(f"the card {file} is damaged: settings, results, network or reference are missing")
    for name, value in settings.items():
        if type(value) is not SETTINGS.get(name):
            raise UserError(f"the card {file} is damaged: the setting {name} is {value!r}")
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("figures"), dict):
            raise UserError(f"the card {file} is damaged: a result has no figures")
    return card


def arguments_of(card: Mapping[str, Any]) -> list[str]:
    """The arguments of the command that computes the card's figures."""
    return _arguments(card["settings"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two cards, a line each: hashes, counts, and figures by more than `TOLERANCE`."""
    found = [
        f"{part}: {old[part].get('sha256')} in the card, now {new[part]['sha256']}"
        for part in ("network", "reference")
        if old[part].get("sha256") != new[part]["sha256"]
    ]
    if len(old["results"]) != len(new["results"]):
        return [*found, f"results: {len(old['results'])} in the card, now {len(new['results'])}"]
    for before, now in zip(old["results"], new["results"], strict=True):
        where = "" if now["step"] is None else f"step {now['step']}, "
        for name in sorted((before.keys() | now.keys()) - {"figures"}):
            if before.get(name) != now.get(name):
                found.append(f"{where}{name}: {before.get(name)} in the card, now {now.get(name)}")
        for name in sorted(before["figures"].keys() | now["figures"].keys()):
            a, b = before["figures"].get(name), now["figures"].get(name)
            if not _close(a, b):
                found.append(f"{where}{name}: {a} in the card, now {b}")
    return found


def _close(a: object, b: object) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=SMALL)
    return a == b


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    # With =, so that a value that begins with a dash is no option.
    given = [name for name in SETTINGS if name in settings]
    return [f"--{name}" if SETTINGS[name] is bool else f"--{name}={settings[name]}" for name in given]
