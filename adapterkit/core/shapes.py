"""Check the fields of updates: tensors against shape strings such as `"r in *k"`, and plain values against rules.

A shape string is a list of axes separated by spaces. An axis is an integer, a name, or a product or quotient of
integers and names (`out/b`, `r*n`). At most one axis is `*name`, which stands for any number of axes. When a shape
string is compared with a tensor's shape, each name in the string gets a size. Tests also create example tensors from
shape strings.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from .. import errors
from ..errors import USE_ITS_BASE, Malformed, ShapeMismatch, Unsupported
from ..io.lazy import as_lazy
from ..linalg.positions import outside
from ..linalg.rotations import block_size

if TYPE_CHECKING:
    from ..io.lazy import Shape
    from .updates.update import Update

Dims = dict[str, int | tuple[int, ...]]
"""A map from the name of an axis to its size. A starred name stands for several axes, and maps to a tuple of sizes."""

_AXIS = re.compile(r"\*[a-z_]\w*|(?:[a-z_]\w*|\d+)(?:[*/](?:[a-z_]\w*|\d+))*")


@dataclass(frozen=True, slots=True)
class Axes:
    """A parsed shape string."""

    text: str
    axes: tuple[str, ...]
    star: int | None
    """The index of the starred axis in `axes`; None if there is no starred axis."""

    @staticmethod
    def parse(text: str) -> Axes:
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Whether no axis is a product or a quotient."""
        return all(axis.lstrip("*").isalnum() or axis.lstrip("*").isidentifier() for axis in self.axes)

    def index(self, axis: str) -> int | None:
        """Return the index of an axis in a tensor's shape; None if the shape string does not list the axis.

        A product such as `r*n` does not count as the axis `r`. An axis after the starred axis gets a negative index,
        because the starred axis may stand for any number of axes.
        """
        if axis not in self.axes:
            return None
        position = self.axes.index(axis)
        return position - len(self.axes) if self.star is not None and position > self.star else position

    def bind(self, shape: tuple[int, ...], dims: Dims, what: str) -> None:
        """Check that a tensor's shape matches this shape string, and add the size of each name to `dims`.

        Args:
            shape: the tensor's shape.
            dims: the sizes that are known from other tensors. New sizes are added in place.
            what: the name of the tensor, for the error.

        Raises:
            ShapeMismatch: the shape does not match this shape string, or contradicts a size in `dims`.
        """
        star = self.star
        fixed = len(self.axes) - (star is not None)
        if len(shape) < fixed or (star is None and len(shape) != fixed):
            raise _mismatch(self, shape, dims, what)
        extra = len(shape) - fixed
        at = 0
        for axis in self.axes:
            if axis.startswith("*"):
                ok = dims.setdefault(axis[1:], shape[at : at + extra]) == shape[at : at + extra]
                at += extra
            else:
                ok = _bind_axis(axis, shape[at], dims)
                at += 1
            if not ok:
                raise _mismatch(self, shape, dims, what)

    def sizes(self, dims: Mapping[str, int | tuple[int, ...]]) -> tuple[int, ...]:
        """Replace each name in this shape string by its size in `dims`, and return the resulting shape."""
        shape: list[int] = []
        for axis in self.axes:
            if axis.startswith("*"):
                rest = dims.get(axis[1:], ())
                shape.extend(rest if isinstance(rest, tuple) else (rest,))
            else:
                shape.append(_evaluate(axis, dims))
        return tuple(shape)


@cache
def _parse(text: str) -> Axes:
    axes = tuple(text.split())
    bad = next((axis for axis in axes if not _AXIS.fullmatch(axis)), None)
    if bad is not None or sum(axis.startswith("*") for axis in axes) > 1:
        raise ValueError(f"the shape string {text!r} is not valid")
    return Axes(text, axes, next((i for i, axis in enumerate(axes) if axis.startswith("*")), None))


def tensor(
    shape: str, *, optional: bool = False, integer: bool = False, below: str = "", distinct: bool = False
) -> Any:
    """Declare a dataclass field that holds a tensor whose shape must match a shape string.

    Args:
        shape: the shape string, such as `"r in *k"`.
        optional: True if the tensor may be missing (None).
        integer: True if the tensor contains integers instead of real numbers.
        below: if the tensor contains indices, the axis (or product of axes) that they index. Each index must be less
            than the axis's size. A tensor may also contain pairs of indices, with the first index of each pair in one
            row and the second index in another row. In this case, `below` names two axes, separated by a space.
        distinct: True if no index (or pair of indices) may occur twice.
    """
    indices = {"integer": integer, "below": tuple(below.split()), "distinct": distinct}
    metadata = {"axes": Axes.parse(shape), "optional": optional, **indices}
    return dataclasses.field(default=None, metadata=metadata) if optional else dataclasses.field(metadata=metadata)


def _bind_axis(axis: str, size: int, dims: Dims) -> bool:
    if axis.isidentifier():
        return dims.setdefault(axis, size) == size
    unknown = [name for name in re.findall(r"[a-z_]\w*", axis) if name not in dims]
    if len(unknown) == 1:
        return _solve(axis, unknown[0], size, dims)
    return bool(unknown) or _evaluate(axis, dims) == size


def _solve(axis: str, name: str, size: int, dims: Dims) -> bool:
    above, below = (math.prod(_value(part, {**dims, name: 1}) for part in parts) for parts in _factors(axis))
    for trial in (size * below // max(above, 1), above // max(size * below, 1)):
        if trial > 0 and _evaluate(axis, {**dims, name: trial}) == size:
            dims[name] = trial
            return True
    return False


@cache
def _factors(axis: str) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Split an axis such as `r*n/b` into the factors of its numerator and the factors of its denominator."""
    factors: dict[str, list[str | int]] = {"*": [], "/": []}
    for sign, part in re.findall(r"([*/])(\w+)", "*" + axis):
        factors[sign].append(int(part) if part.isdigit() else part)
    return tuple(factors["*"]), tuple(factors["/"])


def _value(part: str | int, dims: Mapping[str, int | tuple[int, ...]]) -> int:
    size = dims[part] if isinstance(part, str) else part
    if not isinstance(size, int):
        raise ValueError(f"{part} stands for several axes, so it has no single size")
    return size


def _evaluate(axis: str, dims: Mapping[str, int | tuple[int, ...]]) -> int:
    parts_above, parts_below = _factors(axis)
    above = math.prod([_value(part, dims) for part in parts_above])
    below = math.prod([_value(part, dims) for part in parts_below])
    return above // below if below and above % below == 0 else -1


def _mismatch(axes: Axes, shape: tuple[int, ...], dims: Dims, what: str) -> ShapeMismatch:
    known = ", ".join(f"{name}={size}" for name, size in dims.items())
    why = f"the shape {list(shape)} does not match [{axes.text}]" + (f" with {known}" if known else "")
    return ShapeMismatch(why, where=what, cure="Check the shapes of the other tensors, and the rank in the file")


# The functions below check rules that shape strings cannot express. Some rules limit the value of an attribute, some
# limit the positions that a tensor contains, and some are conditions on axes and attributes.


DAMAGED = "Correct this value; if it comes from a file, write the file again with the tool that made it"
_TYPES = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}


def attribute(
    default: Any = dataclasses.MISSING, *, among: Collection[Any] = (), least: float | None = None,
    most: float | None = None,
    positive: bool = False, since: int = 1,
) -> Any:  # fmt: skip
    """Declare a dataclass field for plain data (an attribute), with rules that its value must satisfy.

    Args:
        default: the value if neither the file nor the caller gives one. Without a default, the attribute is required.
        among: the allowed strings or numbers.
        least: the smallest allowed number.
        most: the largest allowed number.
        positive: True if the number must be above 0.
        since: the version of the method that introduced the attribute.
    """
    rules = {"among": tuple(among), "least": least, "most": most, "positive": positive, "since": since}
    return dataclasses.field(default=default, metadata=rules)


def check_attribute(name: str, value: object, field: dataclasses.Field[object]) -> None:
    """Check a value against the type and the rules of its field.

    Raises:
        Malformed: the value has another type than the field, is not finite, or is out of range.
        Unsupported: the value is not one of the field's allowed values (`among`).
    """
    _check_type(name, value, _type_name(field.type))
    _check_range(name, value, field.metadata)


def plain(value: object, field: dataclasses.Field[object]) -> object:
    """Convert an integer in a float field to a float; return any other value unchanged."""
    return float(value) if type(value) is int and _type_name(field.type) == "float" else value


def _check_type(name: str, value: object, annotation: str) -> None:
    allowed = _TYPES.get(annotation)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and annotation != "bool")):
        raise Malformed(f"{value!r} is not of type {annotation}", where=name, cure=DAMAGED)
    # Do not use `math.isfinite`, which converts an integer to a float and raises OverflowError if the integer is too
    # large. Comparisons between an integer and a float work for any integer.
    if (
        annotation == "float"
        and isinstance(value, int | float)
        and not -sys.float_info.max <= value <= sys.float_info.max
    ):
        raise Malformed(f"{value} is not a finite number", where=name, cure=DAMAGED)


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if rules.get("among") and value not in rules["among"]:
        raise Unsupported(
            f"the value {value!r} is unknown", where=name, cure=f"Known: {', '.join(map(str, rules['among']))}"
        )
    if rules.get("least") is not None and value < rules["least"]:
        raise Malformed(f"{value} is below {rules['least']}", where=name, cure=DAMAGED)
    if rules.get("positive") and not value > 0:
        raise Malformed(f"{value} is not above 0", where=name, cure=DAMAGED)
    if rules.get("most") is not None and value > rules["most"]:
        raise Malformed(f"{value} is above {rules['most']}", where=name, cure=DAMAGED)


def _type_name(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))


# The functions below check tensors that contain positions, which are indices into an axis. Each position must be at
# least 0 and less than the size of the axis. Some fields also forbid that a position occurs twice.


def misplaced(update: Update, sizes: Mapping[str, int | tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """For each field with a position outside its axis, yield the field's name and a description of the error.

    Args:
        update: the update. If a field contains positions, its declaration `tensor(..., below=...)` names their axis.
        sizes: the sizes of axes that the shapes of the update's tensors do not determine.
    """
    fields = update.tensor_fields()
    placed = {name: leaf for name, leaf in update.tensors.items() if fields[name].metadata["below"]}
    stack = any(len(leaf.shape) > len(fields[name].metadata["axes"].axes) for name, leaf in placed.items())
    known: Dims = {**update.dims(stack), **sizes} if placed else {}
    for name, leaf in placed.items():
        axes = fields[name].metadata["below"]
        bounds = tuple(_size(axis, known) for axis in axes)
        worst = outside(leaf, bounds)
        if worst is not None:
            limits = (axis if size is None else f"{axis}={size}" for axis, size in zip(axes, bounds, strict=True))
            yield name, f"position {worst} is outside {' and '.join(limits)}"


def repeated(update: Update) -> str:
    """Return the name of the first `distinct` field in which a position (or a pair) occurs twice; "" if none does."""
    import numpy as np

    fields = update.tensor_fields()
    for name in (name for name in update.tensors if fields[name].metadata["distinct"]):
        tensor = as_lazy(update.tensors[name])
        if not tensor.nbytes:
            continue
        index = tensor.numpy()
        # Sort pairs by two keys. If the positions are large, one integer that combines both positions would overflow.
        rows = [index] if len(fields[name].metadata["below"]) == 1 else [index[..., 0, :], index[..., 1, :]]
        order = np.lexsort(rows, axis=-1)
        sorted_rows = [np.take_along_axis(row, order, -1) for row in rows]
        if np.logical_and.reduce([row[..., 1:] == row[..., :-1] for row in sorted_rows]).any():
            return name
    return ""


def _size(axis: str, sizes: Mapping[str, int | tuple[int, ...]]) -> int | None:
    """Return the size of an axis or of a product of axes; None if a name in `axis` has no size in `sizes`."""
    try:
        return Axes.parse(axis).sizes(sizes)[0]
    except KeyError:
        return None


MOST_EXPONENT = 63
"""The largest exponent in a rule. An expression with a larger exponent has no value, because computing the power could
use up all memory."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a method: it either requires that an expression is true, or defines the size of an axis.

    Attributes:
        require: the expression that must be true.
        define: the axis whose size the rule defines; if the tensors give the axis another size, the update is refused.
        value: the expression that computes the size of the axis `define`.
        when: the rule applies only if this expression is true. If `when` is empty, the rule always applies.
        where: the field or attribute that the error names.
        error: the name of the error class to raise if `require` is not true: `ShapeMismatch` or `Malformed`.
        meaning: a plain explanation of the failure; the error message starts with this text.
    """

    require: str = ""
    define: str = ""
    value: str = ""
    when: str = ""
    where: str = ""
    error: str = "ShapeMismatch"
    meaning: str = ""


def apply_rules(update: Update, dims: Dims, stack: bool) -> None:
    """Check an update against its method's rules, in order. `dims` also gets the sizes that rules define.

    Args:
        update: the update; its attributes and shapes must already be checked.
        dims: the sizes of the update's axes. Rules read these sizes, and may add sizes of further axes.
        stack: True if the tensors have a leading axis of experts.

    Raises:
        ShapeMismatch, Malformed: a rule does not hold.
    """
    names = _Names(update, dims, stack)
    for rule in update.rules:
        if rule.when and not _compiled(rule.when)(names):
            continue
        if rule.define:
            size = _compiled(rule.value)(names)
            if not isinstance(size, int) or size is False or size < 0 or dims.setdefault(rule.define, size) != size:
                why = f"{rule.define} is {dims.get(rule.define)}, but {rule.value} is {size}"
                raise ShapeMismatch(why, where=rule.where or None, cure=_AGAIN)
        elif not _compiled(rule.require)(names):
            known = names.shown(rule.require)
            why = f"{rule.require} does not hold" + (f" with {known}" if known else "")
            why = f"{rule.meaning} ({why})" if rule.meaning else why
            raise getattr(errors, rule.error)(why, where=rule.where or None, cure=_AGAIN)


def check_fits(update: Update, shape: Shape) -> None:
    """Check that an update fits a weight of shape `[out, in, *k]`: all conditions in the update's `fits` must hold.

    Raises:
        ShapeMismatch: a condition does not hold.
    """
    if not update.fits:
        return
    fields = update.tensor_fields()
    leaves = [(fields[name].metadata["axes"].axes, leaf) for name, leaf in update.tensors.items()]
    # If a tensor has one axis more than its shape string, the first axis indexes experts. Skip shape strings with a
    # starred axis: they match any number of axes, so they do not show whether the tensor has an axis of experts.
    stack = any(len(leaf.shape) > len(axes) for axes, leaf in leaves if not any(axis.startswith("*") for axis in axes))
    seen = {"out": shape[0], "in": shape[1] if len(shape) > 1 else 0, "columns": math.prod(shape[1:])}
    seen["kernel"] = max(len(shape) - 2, 0)
    names = _Names(update, {**update.dims(stack), **seen}, stack)
    for rule in update.fits:
        if (not rule.when or _compiled(rule.when)(names)) and not _compiled(rule.require)(names):
            known = names.shown(rule.require)
            why = f"{rule.meaning}: {rule.require} does not hold with {known}; the weight has the shape {list(shape)}"
            raise ShapeMismatch(why, cure=USE_ITS_BASE)


class _NoValue(Exception):
    """Part of an expression has no value. Examples: an axis without a size, a division by 0, a string in a sum."""


class _Names:
    """Look up the names in an expression: return the size of an axis, or the value of an attribute of the update."""

    def __init__(self, update: Update, dims: Mapping[str, object], stack: bool) -> None:
        self.update, self.dims, self.stack = update, dims, stack

    def value(self, name: str) -> int | str:
        name = name.removesuffix("_")
        value = self.dims[name] if name in self.dims else self.update.attributes.get(name)
        # A starred axis has a tuple of sizes. Refuse its name, because rules compute with single integers.
        if not isinstance(value, int | str):
            raise _NoValue(name)
        return int(value) if isinstance(value, bool) else value

    def axes(self, tensor: str) -> int | None:
        """Return how many axes a tensor has, not counting the experts' axis; None if the tensor is absent."""
        leaf = getattr(self.update, tensor)
        return None if leaf is None else len(leaf.shape) - self.stack

    def shown(self, expression: str) -> str:
        """Return the value of each name in an expression as text, such as `r=8, out=64`; omit names without a value."""
        return ", ".join(f"{name}={value}" for name in names_in(expression) if (value := self._known(name)) is not None)

    def _known(self, name: str) -> int | str | None:
        try:
            return self.value(name)
        except _NoValue:
            return None


class _Given(_Names):
    """Like `_Names`, but with sizes and values from two mappings, because there is no update."""

    def __init__(self, values: Mapping[str, object], axes: Mapping[str, int]) -> None:
        self.values, self.given_axes = values, axes

    def value(self, name: str) -> int | str:
        value = self.values.get(name.removesuffix("_"))
        if not isinstance(value, int | str):
            raise _NoValue(name)
        return int(value) if isinstance(value, bool) else value

    def axes(self, tensor: str) -> int | None:
        return self.given_axes.get(tensor)


def value_of(expression: str, values: Mapping[str, object], axes: Mapping[str, int]) -> int | str | None:
    """Return the value of a rule's expression (spec/README.md, section 9); None if the expression has no value.

    Args:
        expression: the expression.
        values: a map from the name of an axis to its size, and from the name of an attribute to its value.
        axes: a map from the name of each present tensor to its number of axes, not counting the experts' axis.
    """
    value = _compiled(expression)(_Given(values, axes))
    return None if value is False else value


@cache
def names_in(expression: str) -> tuple[str, ...]:
    """Return the names of the axes and attributes that an expression reads, each once, in the order of `ast.walk`."""
    tree = ast.parse(_without_keywords(expression), mode="eval")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    asked = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != "block"
    }
    names = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called | asked)
    return tuple(dict.fromkeys(name.id.removesuffix("_") for name in names))


def _without_keywords(expression: str) -> str:
    """Replace the axis name `in` by `in_` in an expression, because `in` is a keyword of Python."""
    return re.sub(r"\bin\b(?!')", "in_", expression)


Evaluate = Callable[[_Names], int | str]
"""A compiled expression: a function that returns an integer or a string, or raises `_NoValue`."""


def _floor(a: int, b: int) -> int:
    if b == 0:
        raise _NoValue("/")
    return a // b


def _modulo(a: int, b: int) -> int:
    return a - _floor(a, b) * b


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= MOST_EXPONENT:
        raise _NoValue("**")
    return int(base**exponent)


_OF_NUMBERS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: _floor, ast.Mod: _modulo,
    ast.Pow: _power, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_OF_EQUALS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}


@cache
def _compiled(expression: str) -> Callable[[_Names], int | str | Literal[False]]:
    """Compile an expression into a function that returns the expression's value, or False if there is no value.

    Comparisons and logical operators return the integer 0 or 1, so the result False always means "no value".
    """
    evaluate = _evaluator(ast.parse(_without_keywords(expression), mode="eval").body)

    def guarded(names: _Names) -> int | str | Literal[False]:
        try:
            return evaluate(names)
        except _NoValue:
            return False

    return guarded


def _evaluator(node: ast.expr) -> Evaluate:
    """Compile one node of an expression.

    Refuse a node that the spec's grammar for rules does not allow, because other programs that implement the spec
    reject such a node.
    """
    match node:
        case ast.Constant(value=value) if isinstance(value, int | str):
            return lambda _: value
        case ast.Name(id=name):
            return lambda names: names.value(name)
        case ast.Call(func=ast.Name(id="has"), args=[ast.Name(id=tensor)]):
            return lambda names: int(names.axes(tensor) is not None)
        case ast.Call(func=ast.Name(id="axes"), args=[ast.Name(id=tensor)]):
            return lambda names: _number(names.axes(tensor))
        case ast.Call(func=ast.Name(id="block"), args=[ast.Name(id=name)]):
            return lambda names: block_size(_number(names.value(name)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _evaluator(operand)
            return lambda names: int(not inner(names))
        case ast.BoolOp(op=op, values=values):
            parts, every = [_evaluator(value) for value in values], isinstance(op, ast.And)
            return lambda names: int((all if every else any)(part(names) for part in parts))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return _pair(type(op), _evaluator(left), _evaluator(right))
    raise ValueError(f"the grammar of rules does not allow {ast.unparse(node)}")


def _pair(op: type[ast.AST], left: Evaluate, right: Evaluate) -> Evaluate:
    if op in _OF_NUMBERS:
        function = _OF_NUMBERS[op]
        return lambda names: int(function(_number(left(names)), _number(right(names))))
    equals = _OF_EQUALS[op]

    def compared(names: _Names) -> int:
        one, other = left(names), right(names)
        if type(one) is not type(other):
            raise _NoValue("a text and a number")
        return int(equals(one, other))

    return compared


def _number(value: int | str | None) -> int:
    if not isinstance(value, int):
        raise _NoValue(value)
    return value


_AGAIN = "Write the adapter again with the tool that made it"
