"""YAML to plain values, with the line of every value and without YAML's surprises.

Plain PyYAML reads `1e-4` as text, `yes` and `off` as booleans, `1:30` as a number in base 60 and `010` as 8, uses the
last of two equal keys, and does not record the position of a value. Here only `true` and `false` are booleans, numbers
are decimal (`1_000` is 1000), a duplicate key is a problem, and aliases and tags of other types are refused.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Path from the top of a document to a value: keys of mappings and indices of sequences."""
MAX_DEPTH = 32
"""Maximum nesting depth; far more than any config has and far less than any reader fails at."""
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a document."""

    line: int | None
    """Line of the problem, counted from 1; None if it has no position."""
    text: str
    """The problem, in one line."""
    path: Path | None = None
    """Path of the value that could not be read and was replaced by None."""


@dataclass(kw_only=True)
class Document:
    """A parsed document. If there are problems, the value holds what could still be read."""

    value: Any = None
    """Dicts, lists, text, numbers, booleans and None."""
    lines: dict[Path, int] = field(default_factory=dict)
    """Line of every key and of every item of a sequence, counted from 1."""
    problems: list[Problem] = field(default_factory=list)
    """All problems, in line order."""


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes only; the constructors of PyYAML are never used."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own table of this name, emptied)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            message = f"aliases (*{event.anchor}) are not supported, write the value out"
            raise yaml.MarkedYAMLError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


# The first matching pattern decides, so whole numbers come before the numbers that include them.
_StrictLoader.add_implicit_resolver(f"{_TAG}null", _NULL, ["~", "n", "N", ""])


_StrictLoader.add_implicit_resolver(f"{_TAG}bool", _BOOL, list("tTfF"))


_StrictLoader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))


_StrictLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes strings that PyYAML or the strict loader would not read as text."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(f"{_TAG}seq", items, flow_style=True))


def parse(text: str) -> Document:
    """Read one YAML document; errors are listed in its `problems`, nothing is raised."""
    document = Document()
    try:
        node = yaml.compose(text, Loader=_StrictLoader)
        if node is not None:
            document.value = _read(node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(Problem(line=mark.line + 1 if mark else None, text=f"not valid YAML: {reason}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = Problem(line=line, text=f"not valid YAML: the character U+{int(error.character):04X} is not allowed")
        document.problems.append(problem)
    except RecursionError:
        document.problems.append(Problem(line=None, text="not valid YAML: nested too deeply"))
    return document


def dump(value: Mapping[str, Any]) -> str:
    """Nested mappings as YAML in the given order; `parse` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def dotted(path: Path) -> str:
    """A path as shown in messages: ("generator", "channel_multipliers", 1) is `generator.channel_multipliers[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _read(node: yaml.Node, path: Path, document: Document) -> Any:
    if len(path) > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return _read_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
        return [_read(item, (*path, index), document) for index, item in enumerate(node.value)]
    name = dotted(path) or "the document"
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str"):
        try:
            return _read_scalar(node)
        except ValueError as error:
            document.problems.append(Problem(line=node.start_mark.line + 1, text=f"{name} {error}", path=path))
            return None
    text = f"{name} has the tag {node.tag.replace(_TAG, '!!')}, tags are not allowed"
    document.problems.append(Problem(line=node.start_mark.line + 1, text=text, path=path))
    return None


def _read_mapping(node: yaml.MappingNode, path: Path, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(
                Problem(line=line, text=f"{dotted(path) or 'the document'} has a key that is no text")
            )
            continue
        here: Path = (*path, key_node.value)
        if key_node.value in result:
            text = f"{dotted(here)} is set twice, first on line {document.lines[here]}; keep one of the two"
            document.problems.append(Problem(line=line, text=text))
            continue
        document.lines[here] = line
        result[key_node.value] = _read(value_node, here, document)
    return result


def _read_scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """Value of a scalar; the pattern is checked again because a tag can be explicit (`!!int abc`)."""
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "str":
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is no valid Unicode text") from None
        for character in text:
            if unicodedata.category(character) == "Cc":
                raise ValueError(f"holds the control character U+{ord(character):04X}; leave it out")
        return text
    pattern = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}[kind]
    if not pattern.match(text):
        raise ValueError(f"has the tag !!{kind} but its value is {text!r}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    if kind == "int":
        if len(digits.lstrip("+-")) > 19:
            raise ValueError("is a number of more than 19 digits")
        return int(digits)
    if text.lower().endswith(("inf", "nan")) or not math.isfinite(float(digits)):
        raise ValueError(f"must be a finite number, got {text}")
    return float(digits)
