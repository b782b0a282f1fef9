"""The walks in docs/architecture.md can be followed: each name is defined in its file and uses its line's words."""

import ast
import re

import pytest

from tests.launch import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
LINE = re.compile(r"(?m)^\d+\. `([\w/.]+)` `([\w.]+)`: (.+)$")
WALKS = {
    title: LINE.findall(text)
    for title, _, text in (section.partition("\n") for section in PAGE.split("\n## "))
    if title.startswith("A walk of ")
}


def definition(source: str, name: str) -> str | None:
    """The source of a function or class, such as `build` or `Loop.run`; None if it does not exist."""
    scope: list[ast.stmt] = ast.parse(source).body
    found: ast.stmt | None = None
    for part in name.split("."):
        named = (node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part)
        if (found := next(named, None)) is None:
            return None
        scope = found.body
    return ast.get_source_segment(source, found) if found else None


def test_each_walk_has_ten_lines() -> None:
    assert {title: len(lines) for title, lines in WALKS.items()} == {"A walk of x0": 10, "A walk of a config key": 10}


@pytest.mark.parametrize(("path", "name", "text"), [line for lines in WALKS.values() for line in lines])
def test_the_place_exists_and_uses_the_words_of_its_line(path: str, name: str, text: str) -> None:
    source = (ROOT / path).read_text()
    if path.endswith(".yaml"):
        assert re.search(rf"(?m)^ +{name}: ", source)
        return
    code = definition(source, name)
    assert code is not None, f"{path} defines no {name}"
    words: list[str] = re.findall(r"`(\w+)`", text)
    missing = [word for word in words if not re.search(rf"\b{word}\b", code)]
    assert not missing, f"{path}: {name} does not mention {missing}"


def test_a_name_that_is_not_defined_is_found() -> None:
    source = "class A:\n    def f(self):\n        return x0\n"
    assert definition(source, "A.f") == "def f(self):\n        return x0"
    assert definition(source, "A.g") is None
    assert definition(source, "f") is None
