"""Conditions on columns, such as `punsafe < 0.1 and original_width >= 512`. They are checked, never executed.

    condition   comparison | not condition | condition and condition | condition or condition | (condition)
    comparison  value < <= > >= == != value ..., or COLUMN in ("a", "b")
    value       COLUMN, a number, "text", True or False

Python's parser reads them; any other kind of expression is refused.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from data.storage.errors import UserError

_MAX_LETTERS = 1000
_GRAMMAR = (
    'allowed are comparisons (< <= > >= == !=) of columns with numbers, "text", True or False, COLUMN in ("a", "b"), '
    "joined by and, or, not and parentheses"
)
_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_Value = bool | float | str


class ConditionError(UserError):
    """A condition that is not of the grammar; the message says what is allowed."""


class MissingError(Exception):
    """A column has no value in a row, or one of another type than it is compared with."""


class Condition:
    """A condition on the values of columns."""

    def __init__(self, text: str) -> None:
        """Read it.

        Raises:
            ConditionError: it is not of the grammar.
        """
        self.text = text
        """As it was given."""
        if len(text) > _MAX_LETTERS:
            raise ConditionError(f"it has {len(text)} letters, allowed are {_MAX_LETTERS}")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ConditionError(f"{text!r} is no condition; {_GRAMMAR}") from None
        self._columns: set[str] = set()
        self._check(self._tree)
        if not self._columns:
            raise ConditionError(f"{text!r} names no column; {_GRAMMAR}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, sorted."""
        return tuple(sorted(self._columns))

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row fulfils it.

        Raises:
            MissingError: a column of the condition, needed or not, has no value of the type that it is compared with.
        """
        values = {name: _value(row.get(name)) for name in self._columns}
        return self._holds(self._tree, values)

    def _check(self, node: ast.expr) -> None:
        """Refuse what is not of the grammar, and collect the columns."""
        match node:
            case ast.BoolOp():
                for part in node.values:
                    self._check(part)
            case ast.UnaryOp(op=ast.Not()):
                self._check(node.operand)
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for op, side in zip(node.ops, node.comparators, strict=True):
                    if isinstance(op, ast.In) and isinstance(side, ast.Tuple | ast.List) and side.elts:
                        sides.remove(side)
                        sides += [self._constant(part) for part in side.elts]
                    elif type(op) not in _ORDERS:
                        self._refuse(node)
                for side in sides:
                    if isinstance(side, ast.Name):
                        self._columns.add(side.id)
                    else:
                        self._constant(side)
            case _:
                self._refuse(node)

    def _constant(self, node: ast.expr) -> ast.expr:
        is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        value = node.operand if isinstance(node, ast.UnaryOp) and is_negative else node
        allowed = (int, float) if is_negative else (bool, int, float, str)
        if not isinstance(value, ast.Constant) or type(value.value) not in allowed:
            self._refuse(node)
        return node

    def _refuse(self, node: ast.expr) -> None:
        part = ast.get_source_segment(self.text.strip(), node) or self.text
        raise ConditionError(f"{self.text!r}: {part!r} is not allowed; {_GRAMMAR}")

    def _holds(self, node: ast.expr, values: Mapping[str, _Value]) -> bool:
        if isinstance(node, ast.BoolOp):
            # All parts: whether a value is missing must not depend on the others.
            parts = [self._holds(part, values) for part in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        if isinstance(node, ast.UnaryOp):
            return not self._holds(node.operand, values)
        assert isinstance(node, ast.Compare)
        left, holds = _side(node.left, values), True
        for op, side in zip(node.ops, node.comparators, strict=True):
            if isinstance(side, ast.Tuple | ast.List):
                choices = [_side(part, values) for part in side.elts]
                holds &= any(_same_type(left, choice) and left == choice for choice in choices)
                continue
            right = _side(side, values)
            if not _same_type(left, right):
                raise MissingError
            holds &= _ORDERS[type(op)](left, right)
            left = right
        return holds


def _side(node: ast.expr, values: Mapping[str, _Value]) -> _Value:
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        assert isinstance(node.operand, ast.Constant)
        return -node.operand.value  # pyright: ignore
    assert isinstance(node, ast.Constant)
    return node.value  # pyright: ignore[reportReturnType]


def _value(value: object) -> _Value:
    """A value of a row.

    Raises:
        MissingError: null, no number, or a list or an object.
    """
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and math.isnan(value)):
        raise MissingError
    return value


def _same_type(one: _Value, other: _Value) -> bool:
    """Numbers compare with numbers, texts with texts, True and False with these."""
    kinds = [bool if isinstance(x, bool) else str if isinstance(x, str) else float for x in (one, other)]
    return kinds[0] is kinds[1]
