"""The values of a future config: where each came from, and what is wrong with it."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data.storage.errors import UserError
from data.storage.redaction import redact
from trainer.config.messages import has_alternatives, nearest, shown, type_at
from trainer.config.strict_yaml import Document, Path, Problem, dotted, parse
from trainer.config.train_config import TrainConfig


class ConfigError(UserError):
    """A config cannot be used; `lines` has one message per error."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(map(redact, lines))
        super().__init__("\n".join(self.lines))


class Draft:
    """The values of a future `TrainConfig`, with the origin of each, and the errors found so far."""

    def __init__(self, document: Document, label: str, where: str = "") -> None:
        """Args:
        where: begins each message.
        """
        self.label, self._where = label, where
        self.lines = document.lines
        self.overrides: dict[Path, str] = {}
        self.unread = {problem.path for problem in document.problems}
        self._problems: list[tuple[float, str]] = []
        self.add_all(document.problems)
        self.data: dict[str, Any] = {}
        if isinstance(document.value, dict):
            self.data = document.value
        elif not document.problems:
            what = "the file is empty" if document.value is None else f"the file holds {shown(document.value)}"
            self.add_all(
                [Problem(line=None, text=f"{what}; a config is a mapping with the sections run, data, training, ...")]
            )
        self.usable = not self._problems or bool(self.data)

    def add_all(self, problems: Iterable[Problem]) -> None:
        """Add problems of the file itself."""
        for problem in problems:
            place = f"{self.label}:{problem.line}" if problem.line else self.label
            self._problems.append((problem.line or 0, f"{place}: {problem.text}"))

    def add(self, path: Path, text: str) -> None:
        """Add a problem with the value at `path`, located where that value was set, else at its section."""
        order, place = self._origin(path)
        self._problems.append((order, f"{place}: {self._where}{text}"))

    def add_rule(self, section: Path, text: str) -> None:
        """Add a broken rule, located at the first field in its text that an override set, else at the file."""
        words = [tuple(word.split(".")) for word in re.findall(r"[a-z]\w*(?:\.\w+)*", text)]
        fields = [
            path
            for known in (self.overrides, self.lines)
            for word in words
            for path in known
            if path[: len(section)] == section and path[len(section) :][-len(word) :] == word and len(path) > 1
        ]
        self.add(fields[0] if fields else section, f"{dotted(section)}: {text}" if section else text)

    def of_stage(self, name: str) -> "Draft":
        """The draft of a stage: these values with its own."""
        inside: Path = ("stages", name)

        def merged(places: Mapping[Path, Any]) -> dict[Path, Any]:
            own = {path[2:]: place for path, place in places.items() if path[:2] == inside}
            return {path: place for path, place in places.items() if path[0] != "stages"} | own

        values = with_stage(self.data, name)
        draft = Draft(Document(value=values, lines=merged(self.lines)), self.label, f"in stage {name}, ")
        draft.overrides = merged(self.overrides)
        return draft

    def add_all_of(self, error: ConfigError) -> None:
        """Add the problems of another draft."""
        self._problems += [(float("inf"), line) for line in error.lines]

    def raise_problems(self) -> None:
        """Raise a ConfigError if there are problems."""
        if self._problems:
            raise ConfigError(text for _, text in sorted(self._problems, key=lambda problem: problem[0]))

    def override(self, text: str) -> None:
        """Apply one `section.field=value`."""
        label = f"--set {text}"
        name, equals, value_text = text.partition("=")
        parts = name.strip().split(".")
        path: Path = tuple(parts)
        if not equals or not all(path):
            self._problems.append(
                (float("inf"), f"{label}: expected section.field=value, such as training.r1_gamma=0.1")
            )
            return
        document = parse(value_text)
        if document.value is None and not value_text.strip() and not document.problems:
            document.problems.append(Problem(line=None, text="no value given; write null to switch the field off"))
        elif parts[0] == "stages" and len(parts) > 1 and parts[1] not in (stages := self._stage_names()):
            guess = nearest(parts[1], stages) or f". Its stages: {', '.join(stages) or 'none'}"
            document.problems.append(Problem(line=None, text=f"the config has no stage {parts[1]}{guess}"))
        elif isinstance(document.value, dict) and not _takes_section_or_value(path):
            document.problems.append(Problem(line=None, text="sets a whole section; set its fields one by one"))
        self._problems += [(float("inf"), f"{label}: {problem.text}") for problem in document.problems]
        if document.problems:
            return
        place = self.data
        *sections, field = parts
        for i, part in enumerate(sections, start=1):
            if not isinstance(place.get(part, {}), dict) and _takes_section_or_value(path[:i]):
                place[part] = {}
                self._set_by(path[:i], label)
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                self._problems.append((float("inf"), f"{label}: {part} is not a section"))
                return
        place[field] = document.value
        self._set_by(path, label)

    def _stage_names(self) -> list[str]:
        stages = self.data.get("stages")
        return list(stages) if isinstance(stages, dict) else []

    def _set_by(self, path: Path, label: str) -> None:
        """Note that an override has set `path`, whatever the file has there."""
        self.overrides[path] = label
        for stale in [known for known in self.lines if known[: len(path)] == path]:
            del self.lines[stale]

    def _origin(self, path: Path) -> tuple[float, str]:
        """Order and name of what set `path`: itself, an override inside it, or the section around it."""
        if path and path not in self.lines:
            for known, text in self.overrides.items():
                if known[: len(path)] == path:
                    return float("inf"), text
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return float("inf"), self.overrides[path[:length]]
            if path[:length] in self.lines:
                return self.lines[path[:length]], f"{self.label}:{self.lines[path[:length]]}"
        return 0, self.label


def with_stage(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values of a config with those of one of its stages, as a config without stages."""

    def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
        for key, value in more.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            else:
                into[key] = copy.deepcopy(value)

    own = dict(values["stages"][name])
    result: dict[str, Any] = {key: copy.deepcopy(value) for key, value in values.items() if key != "stages"}
    result["training"]["total_images"] = own.pop("images")
    merge(result, own)
    return result


def _takes_section_or_value(path: Path) -> bool:
    if path[0] == "stages":
        if len(path) == 1:
            return True
        path = path[2:]
    try:
        return has_alternatives(type_at(TrainConfig, path))
    except (KeyError, TypeError):  # there is no such setting, which is reported later
        return False
