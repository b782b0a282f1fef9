"""The meaning of each setting, from the sections' docstrings: as text (docs/settings.md) and as a JSON schema.

A setting's text is the docstring below its field. A section's text is that of its field, else of its class.
After a change to any of them, regenerate both files:

    python -m trainer.run --explain > docs/settings.md
    python -m trainer.run --schema > trainer/configs/schema.json
"""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from trainer.config.draft import ConfigError
from trainer.config.messages import describe, fields_of, named_sections_in, nearest, section_in
from trainer.config.renamed import RENAMED
from trainer.config.train_config import TrainConfig

INTRODUCTION = """\
# Settings

Every setting of a run: what it takes, its default, and what it does. A config is a YAML file of these sections;
`--set section.key=value` overrides one value. `python -m trainer.run --explain section.key` explains one setting,
`--explain section` a section, and `--explain` prints this page. `--schema` prints a JSON schema for editors.

A setting that takes a number or a mapping with the keys `start`, `end` and `decay_images` may change over the run: its
value moves from start to end along half a cosine while that many training images are seen, and then stays, such as
`r1_gamma: {start: 0.05, end: 0.005, decay_images: 20_000_000}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A section or a setting."""

    name: str
    """Dotted, such as `training.adam.beta1`."""
    kind: Any
    """Annotation of the field."""
    default: Any
    """Default of a setting; `dataclasses.MISSING` for a required setting and for a section."""
    text: str
    """Its description, on one line."""

    @property
    def is_section(self) -> bool:
        """Whether it contains settings instead of a value."""
        return dataclasses.is_dataclass(self.kind) or named_sections_in(self.kind) is not None

    def __str__(self) -> str:
        if self.is_section:
            return f"{'#' * (2 + self.name.count('.'))} {self.name}\n\n{_wrapped(self.text)}"
        default = "no default" if self.default is dataclasses.MISSING else f"default: {_shown(self.default)}"
        return f"- `{self.name}`: {describe(self.kind)} ({default})\n{_wrapped(self.text, indent='  ')}"


def explain(name: str | None = None) -> str:
    """Describe a setting, a section with its contents, or, without a name, all sections; the text is Markdown.

    Raises:
        ConfigError: there is no such setting or section; the message suggests the nearest name.
    """
    known = {entry.name: entry for entry in entries()}
    if name is None:
        return "\n\n".join([INTRODUCTION, *map(str, known.values())])
    if name not in known:
        raise ConfigError([_unknown(name, known)])
    return "\n\n".join(str(entry) for entry in known.values() if f"{entry.name}.".startswith(f"{name}."))


def schema() -> str:
    """A JSON schema of config files, with the text of each section and setting as description."""
    tree = TypeAdapter(TrainConfig).json_schema()
    kinds = [entry.kind for entry in entries()]
    classes = {c.__name__: c for kind in kinds if (c := section_in(kind) or named_sections_in(kind))}
    for section, part in [(TrainConfig, tree), *((classes[name], part) for name, part in tree["$defs"].items())]:
        part |= {"description": inspect.cleandoc(section.__doc__ or ""), "additionalProperties": False}
        for name, text in _texts(section).items():
            part["properties"][name]["description"] = text
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}, indent=2)


def entries(section: type = TrainConfig, prefix: str = "") -> Iterator[Entry]:
    """Sections and settings in the order of the classes; each section is followed by its contents."""
    kinds, texts = fields_of(section), _texts(section)
    for field in dataclasses.fields(section):
        kind, name = kinds[field.name], f"{prefix}{field.name}"
        text = texts.get(field.name) or " ".join((kind.__doc__ or "").split())
        default = field.default
        if field.default_factory is not dataclasses.MISSING and not dataclasses.is_dataclass(kind):
            default = field.default_factory()
        yield Entry(name=name, kind=kind, default=default, text=text)
        if dataclasses.is_dataclass(kind):
            yield from entries(kinds[field.name], f"{name}.")
        elif named := named_sections_in(kind):
            yield from entries(named, f"{name}.NAME.")


@cache
def _texts(section: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, each on one line, by field name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(below.value.value.split())
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _unknown(name: str, known: Mapping[str, Entry]) -> str:
    if name in RENAMED:
        return f"{name} is now called {RENAMED[name]}"
    same = [other for other in known if other.endswith(f".{name}")]
    guess = f"; did you mean `{same[0]}`?" if same else nearest(name, known)
    section = name.rpartition(".")[0]
    inside = f"{section}." if section in known and known[section].is_section else ""
    allowed = [n for n in (n.removeprefix(inside) for n in known if n.startswith(inside)) if "." not in n]
    where = f"In {section}" if inside else "Sections"
    return f"there is no setting {name}{guess or '.'} {where}: {', '.join(allowed)}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 110, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
