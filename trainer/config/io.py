"""Read a config: from YAML and `--set` overrides to a checked `TrainConfig`, and back.

All errors are reported at once, in line order. Unknown and duplicate keys are found here, types and ranges by pydantic
in strict mode from the dataclasses' annotations, rules between fields by `__post_init__`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.storage.location import DataError
from data.storage.paths import expanded
from data.storage.redaction import HIDDEN, redact_values
from trainer.config.draft import ConfigError, Draft
from trainer.config.messages import (
    describe,
    fields_of,
    has_alternatives,
    named_sections_in,
    nearest,
    section_in,
    shown,
    type_at,
)
from trainer.config.paths import PATHS, is_local, understood
from trainer.config.renamed import refusal, rename
from trainer.config.strict_yaml import Document, Path, dotted, dump, parse
from trainer.config.train_config import TrainConfig

CONFIG_FOLDER = FilePath(__file__).parents[1] / "configs"
"""Folder of the configs that can be given by name."""
_ADAPTER = TypeAdapter(TrainConfig)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check a config.

    Args:
        name_or_path: A value with a folder (`runs/x/config.yaml`, `./mine.yaml`) is a file. A value without one that
            ends in `.yaml` or `.yml` is the file of that name in the current folder, if it exists. Anything else is
            the name of a config in `trainer/configs`, with or without `.yaml`.
        overrides: `section.field=value` texts, the value in YAML; the last one for a field wins.

    Raises:
        ConfigError: The file cannot be read, or it or the overrides have errors; lists all of them.
    """
    path = _resolve(name_or_path)
    label = str(path) if path.parent != CONFIG_FOLDER else f"trainer/configs/{path.name}"
    draft = Draft(parse(_read_text(path, label)), label)
    for override in overrides:
        draft.override(override)
    config = _finish(draft)
    for name, value in flat(config).items():
        if isinstance(value, str) and HIDDEN in value and name != "tracking.uri":
            section, field = name.split(".", 1)
            draft.add(
                (section, *field.split(".")),
                f"{name} is {value}: its secret was left out when the file was written. Give the whole value again: "
                f"--set {name}=...",
            )
    draft.raise_problems()
    return config


def load_stored(path: FilePath) -> TrainConfig:
    """Read and check a config written by a run; accepts former names of settings.

    Raises:
        ConfigError: as in `load_config`.
    """
    draft = Draft(parse(_read_text(path, str(path))), str(path))
    rename(draft.data)
    return _finish(draft)


def from_dict(values: Mapping[str, Any], label: str = "config") -> TrainConfig:
    """Check nested mappings, such as a config stored in a checkpoint; `label` is their name in messages."""
    draft = Draft(Document(value=json.loads(json.dumps(values))), label)
    rename(draft.data)
    return _finish(draft)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested plain values (sequences as lists) for JSON and `from_dict`; without tracking.notify, which is a secret."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values["tracking"]["notify"] = None
    return values


def dump_config(config: TrainConfig) -> str:
    """The config as YAML with every field; loading it gives an equal config, but for tracking.notify."""
    return dump(to_dict(config))


def shown_config(config: TrainConfig) -> str:
    """The config as YAML without secrets. Values are redacted one by one, since YAML breaks long texts at blanks."""
    return dump(redact_values(to_dict(config)))


def flat(config: TrainConfig) -> dict[str, str | int | float | bool | None]:
    """Scalars by dotted name, `{"training.r1_gamma": 0.05, ...}`; a sequence becomes a string, `[1, 2, 2]`."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value

    return dict(walk(to_dict(config), ""))


def config_names() -> list[str]:
    """Names of the built-in configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def _resolve(name_or_path: str) -> FilePath:
    try:
        path = FilePath(expanded(name_or_path, "--config"))
    except DataError as error:
        raise ConfigError([str(error)]) from error
    is_yaml = path.suffix in (".yaml", ".yml")
    if "/" in name_or_path or (is_yaml and path.is_file()):
        return path
    stem = path.stem if is_yaml else name_or_path
    if stem in config_names():
        return CONFIG_FOLDER / f"{stem}.yaml"
    guess = nearest(stem, config_names())
    message = f"there is no config {name_or_path!r}{guess or '.'} In trainer/configs: {', '.join(config_names())}"
    raise ConfigError([f"{message}. A file of your own is named with its folder, such as ./mine.yaml"])


def _read_text(path: FilePath, label: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{label}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})"]) from None
    except OSError as error:
        raise ConfigError([f"{label}: cannot be read: {error.strerror}"]) from None


def _finish(draft: Draft) -> TrainConfig:
    if not draft.usable:
        draft.raise_problems()
    suggested = _drop_unknown_keys(draft, draft.data, TrainConfig, ())
    config = None
    try:
        config = _ADAPTER.validate_json(json.dumps(draft.data), strict=True, extra="forbid")
    except ValidationError as invalid:
        for path, error in _errors(invalid, draft.data):
            # Otherwise a misspelt required field and a value that YAML could not read would be reported twice.
            if (error["type"] != "missing" or path not in suggested) and path not in draft.unread:
                _add_error(draft, path, error["type"], error)
    draft.raise_problems()
    assert config is not None
    config = _with_values(config, _understood_paths(draft, config))
    for name in config.stages:
        try:
            _finish(draft.of_stage(name))
        except ConfigError as error:
            draft.add_all_of(error)
    draft.raise_problems()
    return config


def _errors(invalid: ValidationError, values: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The errors, each with the path of its value.

    If a setting takes a number or a section, pydantic reports what is wrong with it as either, and puts the kind into
    the path. A mapping is meant as the section; anything else gets one error.
    """
    reported: set[Path] = set()
    for error in invalid.errors(include_url=False):
        loc: Path = tuple(error["loc"])
        cut = next((i for i in range(1, len(loc)) if has_alternatives(type_at(TrainConfig, loc[:i]))), None)
        if cut is None:
            yield loc, error
            continue
        path, kind, rest = loc[:cut], loc[cut], loc[cut + 1 :]
        section = section_in(type_at(TrainConfig, path))
        value: Any = values
        for part in path:
            value = value[part]
        if isinstance(value, dict):
            if section and kind == section.__name__:
                yield (*path, *rest), error
        elif path not in reported:
            reported.add(path)
            yield path, error


def _understood_paths(draft: Draft, config: TrainConfig) -> dict[str, str]:
    values: dict[str, str] = {}
    for name in PATHS:
        section, field = name.split(".")
        text: str | None = getattr(getattr(config, section), field)
        if text is not None:
            try:
                values[name] = understood(name, text)
            except ValueError as error:
                draft.add((section, field), str(error))
    return values


def _add_error(draft: Draft, path: Path, kind: str, error: Mapping[str, Any]) -> None:
    if kind == "value_error":
        for line in str(error["ctx"]["error"]).splitlines():
            draft.add_rule(path, line)
        return
    wanted = type_at(TrainConfig, path)
    if kind == "missing":
        draft.add(path, f"{dotted(path)} is missing; it must be {describe(wanted)}")
        return
    draft.add(path, f"{dotted(path)} must be {describe(wanted)}, got {shown(error['input'], wanted)}")


def _drop_unknown_keys(draft: Draft, values: dict[str, Any], section: type, path: Path) -> set[Path]:
    """Report and remove keys that are not fields of `section`, at every depth; returns the suggested paths."""
    fields = fields_of(section)
    suggested: set[Path] = set()
    for key in list(values):
        here: Path = (*path, key)
        if key not in fields:
            del values[key]
            if message := refusal(dotted(here)):
                draft.add(here, message)
                continue
            allowed = f"Allowed {f'in {dotted(path)}' if path else 'at the top'}: {', '.join(fields)}"
            guess = nearest(key, fields)
            suggested |= {(*path, name) for name in fields if guess and f"`{name}`" in guess}
            draft.add(here, f"{dotted(here)} is unknown{guess or '.'} {allowed}")
        elif (inner := section_in(fields[key])) and isinstance(values[key], dict):
            suggested |= _drop_unknown_keys(draft, values[key], inner, here)
        elif (inner := named_sections_in(fields[key])) and isinstance(values[key], dict):
            for name, named in values[key].items():
                if isinstance(named, dict):
                    suggested |= _drop_unknown_keys(draft, named, inner, (*here, name))
    return suggested


def inside_ray_job() -> bool:
    """Whether this process is the driver of a `ray job submit`, where each process has its own temporary folder."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def with_absolute_paths(config: TrainConfig, *, inside_job: bool) -> TrainConfig:
    """The config with absolute paths, since each worker has its own current directory.

    Raises:
        ConfigError: inside a Ray job, files at a relative path would be lost with the job's temporary folder.
    """
    local: dict[str, str] = {}
    for name in PATHS:
        section, field = name.split(".")
        path = getattr(getattr(config, section), field)
        if path and is_local(name, path):
            local[name] = path
    if inside_job and (relative := {name: path for name, path in local.items() if not FilePath(path).is_absolute()}):
        raise ConfigError(
            f"{name} is {path}, a relative path: inside a Ray job each process has a temporary folder of its own, and "
            f"what is written there is lost. Give an absolute path that all nodes share: --set {name}=/shared/..."
            for name, path in relative.items()
        )
    return _with_values(config, {name: str(FilePath(path).absolute()) for name, path in local.items()})


def _with_values(config: TrainConfig, values: Mapping[str, str]) -> TrainConfig:
    """The config with other values of some settings, by dotted name."""
    for name, value in values.items():
        section, field = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config
