"""Conditions on columns mean what they say, and nothing else than conditions is accepted."""

from typing import Any

import pytest

from data.prepare.where import Condition, ConditionError, MissingError

ROW = {
    "punsafe": 0.05,
    "width": 640,
    "height": 480,
    "lang": "en",
    "ok": True,
    "none": None,
    "list": [1],
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("punsafe<0.1", True),
        ("punsafe >= 0.1", False),
        ("width >= 512 and height >= 512", False),
        ("width >= 512 or height >= 512", True),
        ("not (lang == 'de') and width != height", True),
        ("100 < height <= 480", True),
        ("lang in ('de', \"en\")", True),
        ("width in (1, 640) and lang in ['de']", False),
        ("ok == True", True),
        ("punsafe > -1", True),
        # Types differ: no value is equal, but the text is none of the choices either.
        ("width in ('640',)", False),
    ],
)
def test_condition_holds_as_python_reads_it(text: str, holds: bool) -> None:
    assert Condition(text).holds(ROW) is holds


@pytest.mark.parametrize(
    "text",
    ["none < 1", "list == 1", "nan < 1", "absent < 1", "lang < 1", "width == '640'", "ok < 2", "width > 1 or none > 1"],
)
def test_value_that_is_missing_or_of_another_type_is_told_apart(text: str) -> None:
    with pytest.raises(MissingError):
        Condition(text).holds(ROW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "punsafe",
        "punsafe <",
        "punsafe = 0.1",
        "1 < 2",
        "punsafe + 1 < 2",
        "__import__('os').system('true')",
        "punsafe.real < 1",
        "punsafe < f()",
        "lang in other",
        "lang in ()",
        "lang is None",
        "lang == b'x'",
        "punsafe < -'a'",
        "punsafe < [x for x in (1,)]",
        "(lambda: 1)() < punsafe",
        "(" * 300 + "punsafe" + ")" * 300 + "< 1 and",
        "punsafe < 1 or " * 200 + "punsafe < 2",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConditionError):
        Condition(text)


def test_columns_are_known_before_any_row() -> None:
    condition: Any = Condition("b < 1 and (a == 'x' or not 2 < b)")
    assert condition.columns == ("a", "b")
