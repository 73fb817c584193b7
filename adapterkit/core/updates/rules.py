"""Rules of a method beyond its shape strings, as data: the spec prints them, and every reader can evaluate them.

A rule is an expression over integers, words and truth values: `r % share == 0`. Names are axes and attributes of the
method. `has(x)` says whether the tensor x is present, `axes(x)` is its number of axes (without that of experts), and
`block(p)` is the b for which b * (b - 1) / 2 is p, or 0. The grammar is in spec/README.md.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ... import errors
from ...errors import ShapeMismatch
from ...linalg.rotations import block_size

if TYPE_CHECKING:
    from ...io.lazy import Shape
    from ..shapes import Dims
    from .update import Update

MOST_EXPONENT = 63
"""Largest exponent. No size needs more; a larger one makes the rule false instead of using up memory."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: it either requires that an expression is true, or defines the size of an axis.

    Attributes:
        require: the expression that must be true.
        define: the axis that gets the value of `value`; if the tensors gave it another size, the shapes disagree.
        value: the expression of that size.
        when: the rule applies only if this expression is true; empty means always.
        where: the field or attribute that an error names.
        error: the class of the error, `ShapeMismatch` or `Malformed`.
        meaning: an explanation of the failure, in plain words.
    """

    require: str = ""
    define: str = ""
    value: str = ""
    when: str = ""
    where: str = ""
    error: str = "ShapeMismatch"
    meaning: str = ""


def apply_rules(update: Update, dims: Dims, stack: bool) -> None:
    """Check an update against the rules of its method, in order, and add the sizes that they define to `dims`.

    Args:
        update: the update; its forms, attributes and shapes are already checked.
        dims: sizes of its axes, which rules read and extend.
        stack: True if its tensors have a leading axis of experts.

    Raises:
        ShapeMismatch, Malformed: a rule does not hold.
    """
    names = _Names(update, dims, stack)
    for rule in update.rules:
        if rule.when and not _compiled(rule.when)(names):
            continue
        if rule.define:
            size = _compiled(rule.value)(names)
            if size is False or size < 0 or dims.setdefault(rule.define, size) != size:
                why = f"{rule.define} is {dims.get(rule.define)}, and {rule.value} is {size}"
                raise ShapeMismatch(why, where=rule.where or None, cure=_AGAIN)
        elif not _compiled(rule.require)(names):
            known = ", ".join(f"{name}={names.value(name)}" for name in names_in(rule.require))
            why = f"{rule.require} does not hold" + (f" with {known}" if known else "")
            why = f"{rule.meaning} ({why})" if rule.meaning else why
            raise getattr(errors, rule.error)(why, where=rule.where or None, cure=_AGAIN)


def check_fits(update: Update, shape: Shape) -> None:
    """Check an update's `fits` against the shape `[out, in, *k]` of a weight.

    Raises:
        ShapeMismatch: one does not hold.
    """
    if not update.fits:
        return
    fields = update.tensor_fields()
    held = [(fields[name].metadata["axes"].axes, leaf) for name, leaf in update.tensors.items()]
    # An axis more than the shape string says is that of experts; a star stands for any number of axes.
    stack = any(len(leaf.shape) > len(axes) for axes, leaf in held if not any(axis.startswith("*") for axis in axes))
    seen = {"out": shape[0], "in": shape[1] if len(shape) > 1 else 0, "columns": math.prod(shape[1:])}
    names = _Names(update, {**update.dims(stack), **seen}, stack)
    for rule in update.fits:
        if (not rule.when or _compiled(rule.when)(names)) and not _compiled(rule.require)(names):
            why = f"{rule.meaning} ({rule.require} does not hold for a weight of {list(shape)})"
            raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")


class _NoSize(Exception):
    """An axis whose size no tensor shows."""


class _Names:
    """The values of the names in an expression."""

    def __init__(self, update: Update, dims: Mapping[str, Any], stack: bool) -> None:
        self.update, self.dims, self.stack = update, dims, stack

    def value(self, name: str) -> Any:
        name = name.removesuffix("_")
        if name in self.dims:
            return self.dims[name]
        if name not in self.update.attributes:
            raise _NoSize(name)
        return self.update.attributes[name]

    def call(self, function: str, argument: str) -> Any:
        if function == "block":
            return block_size(self.value(argument))
        tensor = getattr(self.update, argument)
        return tensor is not None if function == "has" else len(tensor.shape) - self.stack


def names_in(expression: str) -> list[str]:
    """Return the axes and attributes that an expression reads, in order."""
    tree = ast.parse(_without_keywords(expression), mode="eval")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    asked = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != "block"
    }
    names = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called | asked)
    return list(dict.fromkeys(name.id.removesuffix("_") for name in names))


def _without_keywords(expression: str) -> str:
    """The expression with `in_` for the axis `in`, which is a keyword of Python."""
    return re.sub(r"\bin\b(?!')", "in_", expression)


Evaluate = Callable[[_Names], Any]

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


@cache
def _compiled(expression: str) -> Evaluate:
    evaluate = _evaluator(ast.parse(_without_keywords(expression), mode="eval").body)

    def guarded(names: _Names) -> Any:
        try:
            return evaluate(names)
        except (ZeroDivisionError, OverflowError, _NoSize):
            return False

    return guarded


def _evaluator(node: ast.expr) -> Evaluate:
    """Return the function of one node; nothing outside of the spec's grammar, which every reader must implement."""
    match node:
        case ast.Constant(value=value) if isinstance(value, int | str):
            return lambda _: value
        case ast.Name(id=name):
            return lambda names: names.value(name)
        case ast.Call(func=ast.Name(id="has" | "axes" | "block" as called), args=[ast.Name(id=argument)]):
            return lambda names: names.call(called, argument)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _evaluator(operand)
            return lambda names: not inner(names)
        case ast.BoolOp(op=op, values=values):
            parts, every = [_evaluator(value) for value in values], isinstance(op, ast.And)
            return lambda names: (all if every else any)(part(names) for part in parts)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _evaluator(left), _evaluator(right)
            return lambda names: _power(base(names), exponent(names))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            function, first, second = _OPERATORS[type(op)], _evaluator(left), _evaluator(right)
            return lambda names: function(first(names), second(names))
    raise ValueError(f"not part of the grammar of rules: {ast.unparse(node)}")


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= MOST_EXPONENT:
        raise OverflowError(exponent)
    return int(base**exponent)


_AGAIN = "Write the adapter again with the tool that made it"
