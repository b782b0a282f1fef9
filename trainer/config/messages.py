"""Wording of config errors: what a field accepts, what it got, which name was probably meant."""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic.fields import FieldInfo

from data.storage.redaction import redact
from trainer.config.strict_yaml import Path


@functools.cache
def fields_of(section: type) -> Mapping[str, Any]:
    """Annotation of each field of a config dataclass, in field order."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def type_at(section: type, path: Path) -> Any:
    """Annotation of the value at `path` below the dataclass `section`."""
    annotation: Any = section
    for part in path:
        annotation = section_in(annotation) or _without_extras(annotation)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            continue
        if isinstance(part, int):
            items = get_args(annotation)
            annotation = items[0] if len(items) == 2 and items[1] is ... else items[min(part, len(items) - 1)]
        else:
            annotation = fields_of(annotation)[part]
    return annotation


def section_in(annotation: Any) -> type | None:
    """The dataclass that a field takes, alone or as one of its alternatives; None if it takes only values."""
    plain = _without_extras(annotation)
    choices = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
    return next((choice for choice in choices if isinstance(choice, type) and dataclasses.is_dataclass(choice)), None)


def named_sections_in(annotation: Any) -> type | None:
    """The dataclass of each value of a field that takes a mapping from names to sections; None for other fields."""
    return section_in(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def has_alternatives(annotation: Any) -> bool:
    """Whether a field takes values of more than one kind, null aside."""
    return get_origin(_without_extras(annotation)) in (Union, UnionType)


def describe(annotation: Any) -> str:
    """What a field accepts, such as "a whole number > 0, or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = " and ".join(filter(None, (_bound(extra) for extra in _flatten(arguments[1:]))))
        why = next((extra.description for extra in arguments[1:] if isinstance(extra, FieldInfo)), None)
        return f"{describe(arguments[0])} {bounds}".strip() + (f" ({why})" if why else "")
    if origin in (Union, UnionType):
        words = [describe(argument) for argument in arguments if argument is not NoneType]
        return " or ".join(words).replace(" or a section with", ", or a mapping with") + (
            ", or null" if NoneType in arguments else ""
        )
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is dict:
        section = named_sections_in(annotation)
        keys = f" from names to sections with the keys {', '.join(fields_of(section))}" if section else ""
        return f"a mapping{keys}"
    if origin is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return f"a section with the keys {', '.join(fields_of(annotation))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]


def shown(value: Any, wanted: Any = None) -> str:
    """A value as shown in messages; given the field's annotation, with a hint for common mistakes."""
    if isinstance(value, dict):
        return "a mapping"
    words = redact(value if isinstance(value, str) else json.dumps(value))
    words = words if len(words) <= 60 else words[:57] + "..."
    if isinstance(value, str):
        words = f'the text "{words}"'
    plain = _without_extras(wanted)
    if plain is int and isinstance(value, float) and value.is_integer():
        return f"{words}; write {int(value)}"
    if plain is bool and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        return f"{words}; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if plain is str and not isinstance(value, (str, list)):
        return f"{words}; put it in quotes if it is meant as text"
    if get_origin(plain) is Literal and isinstance(value, str):
        return words + nearest(value, [str(choice) for choice in get_args(plain)])
    return words


def nearest(word: str, choices: Iterable[str]) -> str:
    """The clause "; did you mean `x`?" for the choice nearest to `word`, or an empty string if none is near."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean `{found[0]}`?" if found else ""


def _without_extras(annotation: Any) -> Any:
    """The type inside Annotated[...] and `... | None`."""
    while True:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            annotation = arguments[0]
        elif origin in (Union, UnionType) and NoneType in arguments:
            annotation = Union[tuple(argument for argument in arguments if argument is not NoneType)]  # noqa: UP007
        else:
            return annotation


def _flatten(extras: Iterable[Any]) -> Iterable[Any]:
    for extra in extras:
        yield from extra.metadata if isinstance(extra, FieldInfo) else (extra,)


def _bound(extra: Any) -> str:
    if isinstance(extra, annotated_types.Gt):
        return f"> {_number(extra.gt)}"
    if isinstance(extra, annotated_types.Ge):
        return f">= {_number(extra.ge)}"
    if isinstance(extra, annotated_types.Lt):
        return f"< {_number(extra.lt)}"
    if isinstance(extra, annotated_types.Le):
        return f"<= {_number(extra.le)}"
    if isinstance(extra, annotated_types.MultipleOf):
        return f"a multiple of {extra.multiple_of}"
    if isinstance(extra, annotated_types.MinLen):
        return f"of at least {extra.min_length} item{'' if extra.min_length == 1 else 's'}"
    if isinstance(extra, annotated_types.MaxLen):
        return f"of at most {extra.max_length} item{'' if extra.max_length == 1 else 's'}"
    return ""


def _number(value: Any) -> str:
    """A bound as shown in messages: 2**63 instead of its nineteen digits."""
    is_power = isinstance(value, int) and value >= 2**31 and value & (value - 1) == 0
    return f"2**{value.bit_length() - 1}" if is_power else str(value)
