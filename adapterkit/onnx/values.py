"""Graph values that formulas use like arrays: each operator and each array-API function appends nodes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Union, cast

import numpy as np
import onnx_ir as ir

from .building import FREE, Array, Attribute, Branch, element_type

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.lazy import Leaf

Updates = TypeVar("Updates", bound="Update")

Sizes = tuple[int | None, ...]
"""The sizes of a value's axes. A dynamic size is None, or a placeholder of at least `FREE`."""

Operand = Union["Value", Array]
"""An argument or a result of the functions of `SYMBOLS`. If no argument is a graph value, numpy computes the result."""

Kind = np.dtype[np.generic] | type[np.generic] | type[bool]
"""An element type."""

Axes = int | tuple[int, ...] | None
"""The axes to reduce; None for all."""


class Unsayable(AttributeError, TypeError):
    """A formula needs an operation that ONNX nodes cannot compute.

    If all values that the formula reads are constants, numpy can compute the formula instead.
    """


class OpenSize(int):
    """A placeholder for a dynamic size. Formulas may use it in shapes; `/`, `**` and `float()` raise `Unsayable`."""

    def _no_number(self, *_: object) -> NoReturn:
        raise Unsayable("the formula computes a number from a dynamic size")

    __truediv__ = __rtruediv__ = __float__ = __pow__ = __rpow__ = _no_number


def broadcast(one: Sizes | None, two: Sizes | None) -> Sizes | None:
    """Return the sizes of two operands after broadcasting; None if the number of axes of either operand is unknown."""
    if one is None or two is None:
        return None
    pad = max(len(one), len(two))
    pairs = zip((1,) * (pad - len(one)) + one, (1,) * (pad - len(two)) + two, strict=True)
    return tuple(_wider(a, b) for a, b in pairs)


def _wider(a: int | None, b: int | None) -> int | None:
    if a == b or b == 1:
        return a
    if a == 1 or a is None:
        return b
    return a


def multiplied(one: Sizes | None, two: Sizes | None) -> Sizes | None:
    """Return the sizes of the matrix product of two operands.

    Return None if an operand's number of axes is unknown, or is less than 2.

    Raises:
        Unsayable: the first operand's number of columns is not the second operand's number of rows.
    """
    if one is None or two is None or len(one) < 2 or len(two) < 2:
        return None
    columns, rows = one[-1], two[-2]
    if columns is not None and rows is not None and columns != rows and max(columns, rows) < FREE:
        raise Unsayable(f"a matrix with {columns} columns is multiplied by a matrix with {rows} rows")
    lead = broadcast(one[:-2], two[:-2])
    assert lead is not None
    return (*lead, one[-2], two[-1])


def filled(sizes: Sizes | None, wanted: Sequence[int | None]) -> Sizes:
    """Return the shape after a reshape: `wanted`, with -1 replaced by the size of its axis.

    If this size cannot be computed, None replaces -1. The computation ignores each axis that has the same dynamic size
    in `sizes` and in `wanted`, because the reshape keeps such an axis.

    Args:
        sizes: the sizes before the reshape.
        wanted: the requested shape.
    """
    if -1 not in wanted:
        return tuple(wanted)
    stays = _staying(sizes, wanted)
    left = None if sizes is None else [size for place, size in enumerate(sizes) if place not in stays]
    if left is None or None in left:
        return tuple(None if size == -1 else size for size in wanted)
    known = math.prod(size for place, size in enumerate(wanted) if size and size > 0 and place not in stays)
    total = math.prod(left)  # type: ignore[arg-type]
    return tuple((total // known if known else 0) if size == -1 else size for size in wanted)


def spelled(sizes: Sizes | None, wanted: Sequence[int | None], worked_out: Sizes) -> list[int]:
    """Return the value of the input `shape` of a Reshape node.

    An entry is 0 if the axis keeps its dynamic size, and -1 if the node computes the size.

    Args:
        sizes: the sizes before the reshape.
        wanted: the requested shape.
        worked_out: the result of `filled(sizes, wanted)`.

    Raises:
        Unsayable: a Reshape node cannot express the shape.
    """
    out: list[int] = []
    stays = _staying(sizes, wanted)
    for position, size in enumerate(worked_out):
        if size is not None and 0 < size < FREE:
            out.append(size)
        elif position in stays:
            out.append(0)
        elif size == 0 or -1 in out:
            raise Unsayable("the formula reshapes to a size of 0, or to more than one unknown size")
        else:
            out.append(-1)
    if -1 in out and 0 in out:
        raise Unsayable("the formula reshapes to an unknown size, and keeps a dynamic size that may be 0")
    return out


def _staying(sizes: Sizes | None, wanted: Sequence[int | None]) -> set[int]:
    """Return the axes that have the same dynamic size before and after a reshape."""
    pairs = enumerate(zip(sizes or (), wanted, strict=False))
    return {place for place, (size, other) in pairs if size == other and (size is None or size >= FREE)}


def reduced(sizes: Sizes | None, axes: tuple[int, ...] | None, keepdims: bool) -> Sizes | None:
    """Return the sizes of a value after a reduction along some axes, or along all axes."""
    if sizes is None:
        return None
    gone = set(range(len(sizes))) if axes is None else {axis % len(sizes) for axis in axes}
    kept = ((1 if n in gone else size) for n, size in enumerate(sizes) if keepdims or n not in gone)
    return tuple(kept)


# Index graph values with slices, integers, new axes, and one list of positions.


_END = np.iinfo(np.int64).max


def taken(value: Value, key: object) -> Value:
    """Return `value[key]`.

    Raises:
        Unsayable: indexing with this key is not supported, for example with a mask or several lists of positions.
    """
    parts = _spread(value, key if isinstance(key, tuple) else (key,))
    out = _sliced(value, [(axis, part) for axis, part in parts if isinstance(part, slice | int) and axis is not None])
    lists = [(axis, part) for axis, part in parts if axis is not None and not isinstance(part, slice | int)]
    if len(lists) > 1:
        raise Unsayable("an index has several lists of positions")
    wide = _gathered(out, *lists[0]) if lists else out
    return _shaped(wide, parts, lists)


def written(value: Value, key: object, values: Value) -> Value:
    """Return `value` after `value[:, positions] = values` or `value[positions] = values`.

    Raises:
        Unsayable: the key has neither of these forms, or `positions` is not a list.
    """
    parts = key if isinstance(key, tuple) else (key,)
    *before, last = parts
    if any(part != slice(None) for part in before) or len(before) > 1 or not isinstance(last, list):
        raise Unsayable("the formula assigns to an index other than [positions] and [:, positions]")
    turn = bool(before)
    index = np.array(last, dtype=np.int64)[:, None]
    # Move the axis of the positions to the front, because ScatterND indexes the first axis.
    rows, new = (value.swapaxes(0, 1), values.swapaxes(0, 1)) if turn else (value, values)

    def numbers(a: Array, b: Array) -> Array:
        out = a.copy()
        out[index[:, 0]] = b
        return out

    places = value.branch.building.literal(index)
    node = rows.branch.node("ScatterND", [rows.value, places, new.value], None, rows.dtype, rows.sizes)
    known = (lambda: numbers(rows.numbers(), new.numbers())) if rows.known and new.known else None
    scattered = Value(rows.branch, rows.sizes, rows.dtype, node, known)
    return scattered.swapaxes(0, 1) if turn else scattered


def _spread(value: Value, key: tuple[object, ...]) -> list[tuple[int | None, object]]:
    """Return `(axis, part of the key)` pairs, with `...` expanded.

    If the number of axes is unknown, the axes after `...` are negative, i.e. counted from the end.
    """
    if not any(part is Ellipsis for part in key):
        return _numbered(key, 0)
    at = next(n for n, part in enumerate(key) if part is Ellipsis)
    before, behind = key[:at], key[at + 1 :]
    count = sum(part is not None for part in behind)
    if value.sizes is None:
        if any(part is None or isinstance(part, int) for part in key):
            raise Unsayable("the graph does not show how many axes a value has")
        return [*_numbered(before, 0), *_numbered(behind, -count)]
    middle = [(axis, slice(None)) for axis in range(sum(p is not None for p in before), value.ndim - count)]
    return [*_numbered(before, 0), *middle, *_numbered(behind, value.ndim - count)]


def _numbered(parts: tuple[object, ...], axis: int) -> list[tuple[int | None, object]]:
    out: list[tuple[int | None, object]] = []
    for part in parts:
        out.append((None, None) if part is None else (axis, part))
        axis += part is not None
    return out


def _sliced(value: Value, parts: list[tuple[int, slice | int]]) -> Value:
    """Apply the slices and integers of a key. An integer counts as a slice of length 1."""
    cuts = [(axis, _cut(part)) for axis, part in parts if part != slice(None)]
    if not cuts:
        return value
    axes, starts, stops, steps = zip(*((axis, c.start, c.stop, c.step) for axis, c in cuts), strict=True)
    # Refuse limits near FREE: they were computed from a dynamic size, whose placeholder is at least FREE.
    if any(abs(limit) >= FREE // 2 and limit != _END for limit in (*starts, *stops)):
        raise Unsayable("the limits of a slice depend on a dynamic size")
    # Refuse to slice a dynamic axis: a formula that loops over all positions of such an axis would not end.
    if any((size := value.sizes[axis]) is not None and size >= FREE for axis in axes if value.sizes is not None):
        raise Unsayable("the formula slices an axis with a dynamic size")
    literal = value.branch.building.literal
    more = [literal(np.array(numbers, dtype=np.int64)) for numbers in (starts, stops, axes, steps)]

    def numbers(a: Array) -> Array:
        whole = [slice(None)] * a.ndim
        for axis, cut in cuts:
            whole[axis] = cut
        return a[tuple(whole)]

    return value.apply("Slice", [value], numbers, _cut_sizes(value.sizes, cuts), more=more)


def _cut(part: slice | int) -> slice:
    if isinstance(part, int):
        # For index -1, stop at the end of the axis: -1 + 1 would be 0, the start of the axis.
        return slice(part, part + 1 if part != -1 else _END, 1)
    step = 1 if part.step is None else part.step
    if step < 1:
        raise Unsayable("a slice has a negative step")
    return slice(part.start or 0, _END if part.stop is None else part.stop, step)


def _cut_sizes(sizes: Sizes | None, cuts: list[tuple[int, slice]]) -> Sizes | None:
    if sizes is None:
        return None
    out = list(sizes)
    for axis, cut in cuts:
        size = out[axis]
        out[axis] = None if size is None or size >= FREE else len(range(size)[cut])
    return tuple(out)


def _gathered(value: Value, axis: int, positions: object) -> Value:
    if value.sizes is not None and (value.sizes[axis] or 0) >= FREE:
        raise Unsayable("the formula selects positions along an axis with a dynamic size")
    if isinstance(positions, Value):
        index, shape = positions, positions.shape
    else:
        array = np.asarray(positions)
        if array.dtype.kind not in "iu":
            raise Unsayable("the formula indexes with a mask, or with another array whose dtype is not integer")
        shape, index = array.shape, value.like(0)
        literal = value.branch.building.literal(array.astype(np.int64))
        index = Value(value.branch, array.shape, np.int64, literal, lambda: array)
    sizes = None if value.sizes is None or axis < 0 else (*value.sizes[:axis], *shape, *value.sizes[axis + 1 :])
    node = value.branch.node("Gather", [value.value, index.value], {"axis": axis}, value.dtype, sizes)
    known = (lambda: np.take(value.numbers(), index.numbers(), axis)) if value.known and index.known else None
    return Value(value.branch, sizes, value.dtype, node, known)


def _shaped(value: Value, parts: list[tuple[int | None, object]], lists: list[tuple[int, object]]) -> Value:
    """Remove the axes that the key indexes with integers, and insert an axis for each None in the key."""
    wider = 0
    if lists:
        positions = lists[0][1]
        wider = (positions.ndim if isinstance(positions, Value) else np.asarray(positions).ndim) - 1
        if wider and (any(part is None or isinstance(part, int) for _, part in parts)):
            raise Unsayable("an index has a nested list of positions, and also an integer or a new axis")
    gone = [axis for axis, part in parts if axis is not None and isinstance(part, int)]
    out = _without(value, gone) if gone else value
    kept = [part is None for _, part in parts if part is None or not isinstance(part, int)]
    new = [position for position, fresh in enumerate(kept) if fresh]
    return _with(out, new) if new else out


def _without(value: Value, axes: list[int]) -> Value:
    sizes = None if value.sizes is None else tuple(s for n, s in enumerate(value.sizes) if n not in axes)
    literal = value.branch.building.literal(np.array(axes, dtype=np.int64))
    return value.apply("Squeeze", [value], lambda a: np.squeeze(a, tuple(axes)), sizes, more=[literal])


def _with(value: Value, axes: list[int]) -> Value:
    sizes = None
    if value.sizes is not None:
        left = list(value.sizes)
        for axis in axes:
            left.insert(axis, 1)
        sizes = tuple(left)
    literal = value.branch.building.literal(np.array(axes, dtype=np.int64))
    return value.apply("Unsqueeze", [value], lambda a: np.expand_dims(a, tuple(axes)), sizes, more=[literal])


# The array-API functions for graph values; a formula gets them from `namespace(value)`.
# Operands may also be numpy arrays; if none is a graph value, numpy computes the result. No node computes
# decompositions or solves equations, so `linalg` works only for graph values that are constant.
# https://data-apis.org/array-api/latest/


arrays: Any = import_module("array_api_compat.numpy")


class _Linalg:
    """numpy's decompositions and solvers. Graph values must be constant, and numpy computes with them in float64."""

    def __getattr__(self, name: str) -> Callable[..., Operand | tuple[Operand, ...]]:
        f = getattr(np.linalg, name)

        def worked_out(*operands: Operand, **options: object) -> Operand | tuple[Operand, ...]:
            first = next((one for one in operands if isinstance(one, Value)), None)
            if first is None:
                plain: Array | tuple[Array, ...] = f(*operands, **options)
                return plain
            known = [one.numbers() if isinstance(one, Value) else one for one in operands]
            results = f(*(np.asarray(array, dtype=np.float64) for array in known), **options)
            if isinstance(results, tuple):
                return tuple(_constant(first, array) for array in results)
            return _constant(first, results)

        return worked_out


class Symbols:
    """The array-API namespace of graph values. Access to a function that it does not have raises `Unsayable`."""

    __name__ = __name__  # array_api_compat identifies namespaces by name.
    float32, float64, float16, int64, inf = np.float32, np.float64, np.float16, np.int64, np.inf
    linalg = _Linalg()

    def arange(self, *limits: int, **kind: object) -> Array:
        array: Array = arrays.arange(*_closed(limits), **kind)
        return array

    def eye(self, *sizes: int, **kind: object) -> Array:
        array: Array = arrays.eye(*_closed(sizes), **kind)
        return array

    def zeros(self, shape: Sequence[int], **kind: object) -> Array:
        array: Array = arrays.zeros(_closed(shape), **kind)
        return array

    def ones(self, shape: Sequence[int], **kind: object) -> Array:
        array: Array = arrays.ones(_closed(shape), **kind)
        return array

    def finfo(self, dtype: Kind) -> Any:
        return import_module("ml_dtypes").finfo(dtype)

    def __getattr__(self, name: str) -> NoReturn:
        raise Unsayable(f"no ONNX node is known for the function {name}")

    def astype(self, x: Operand, dtype: Kind) -> Operand:
        return x.cast(dtype) if isinstance(x, Value) else np.asarray(x).astype(dtype)

    def where(self, condition: Operand, one: Operand, two: Operand) -> Operand:
        like = next((v for v in (one, two, condition) if isinstance(v, Value)), None)
        if like is None:
            return np.where(condition, one, two)
        first, second = like.like(one), like.like(two)
        choice = like.like(condition)
        shape = broadcast(broadcast(choice.sizes, first.sizes), second.sizes)
        return first.apply("Where", [choice, first, second], np.where, shape)

    def clip(self, x: Value, low: object, high: object) -> Value:
        if low is not None:
            x = x.apply("Max", [x, low], np.maximum, x.sizes)
        return x if high is None else x.apply("Min", [x, high], np.minimum, x.sizes)

    def exp(self, x: Operand) -> Operand:
        return _each("Exp", np.exp, x)

    def log1p(self, x: Operand) -> Operand:
        # ONNX has no Log1p.
        return _each("Log", np.log, 1 + x)

    def expm1(self, x: Operand) -> Operand:
        # ONNX has no Expm1.
        return self.exp(x) - 1

    def tanh(self, x: Operand) -> Operand:
        return _each("Tanh", np.tanh, x)

    def cos(self, x: Operand) -> Operand:
        return _each("Cos", np.cos, x)

    def sin(self, x: Operand) -> Operand:
        return _each("Sin", np.sin, x)

    def abs(self, x: Operand) -> Operand:
        return _each("Abs", np.abs, x)

    def sqrt(self, x: Operand) -> Operand:
        return _each("Sqrt", np.sqrt, x)

    def erf(self, x: Operand) -> Operand:
        return _each("Erf", np.vectorize(math.erf), x)

    def sum(self, x: Operand, axis: Axes = None, keepdims: bool = False) -> Operand:
        reducible: Any = x  # numpy's return type depends on `keepdims` and on numpy's version.
        total: Operand = reducible.sum(axis=axis, keepdims=keepdims)
        return total

    def mean(self, x: Operand, axis: Axes = None, keepdims: bool = False) -> Operand:
        reducible: Any = x  # numpy's return type depends on `keepdims` and on numpy's version.
        average: Operand = reducible.mean(axis=axis, keepdims=keepdims)
        return average

    def max(self, x: Operand, axis: Axes = None, keepdims: bool = False) -> Operand:
        reducible: Any = x  # numpy's return type depends on `keepdims` and on numpy's version.
        largest: Operand = reducible.max(axis=axis, keepdims=keepdims)
        return largest

    def cumulative_sum(self, x: Operand, axis: int) -> Operand:
        return x.cumsum(axis)

    def argsort(self, x: Value, axis: int = -1) -> Value:
        """Return the indices that sort x in ascending order; equal entries keep their order."""
        if x.shape[axis] is None or x.shape[axis] >= FREE:
            raise Unsayable("the formula sorts along an axis with a dynamic size")
        count = x.branch.building.literal(np.array([x.shape[axis]], dtype=np.int64))
        words = {"axis": axis, "largest": 0}
        # Use TopK of all entries, because ONNX has no ArgSort; TopK puts the lower index of equal entries first.
        node = x.branch.node("TopK", [x.value, count], words, np.int64, x.sizes, position=1)
        known = (lambda: np.argsort(x.numbers(), axis, kind="stable")) if x.known else None
        return Value(x.branch, x.sizes, np.int64, node, known)

    def take_along_axis(self, x: Value, indices: Value, axis: int) -> Value:
        return x.apply(
            "GatherElements", [x, indices], lambda a, at: np.take_along_axis(a, at, axis), indices.sizes,
            attributes={"axis": axis},
        )  # fmt: skip

    def reshape(self, x: Operand, shape: Sequence[int]) -> Operand:
        return x.reshape(shape)

    def moveaxis(self, x: Value, source: int, destination: int) -> Value:
        if source == destination:
            return x
        order = [axis for axis in range(x.ndim) if axis != source % x.ndim]
        order.insert(destination % x.ndim, source % x.ndim)
        return x.transposed(order)

    def permute_dims(self, x: Value, order: Sequence[int]) -> Value:
        return x.transposed(order)

    def concat(self, parts: Sequence[Operand], axis: int = 0) -> Operand:
        like = next((one for one in parts if isinstance(one, Value)), None)
        if like is None:
            return np.concatenate(parts, axis)
        return concatenated([like.like(one) for one in parts], axis)

    def stack(self, parts: Sequence[Operand], axis: int = 0) -> Operand:
        if not any(isinstance(one, Value) for one in parts):
            return np.stack(parts, axis)
        place = axis if axis >= 0 else axis + 1 + parts[0].ndim
        return self.concat([one[(*[slice(None)] * place, None)] for one in parts], axis=place)

    def zeros_like(self, x: Value) -> Value:
        return self.full_like(x, 0)

    def ones_like(self, x: Value) -> Value:
        return self.full_like(x, 1)

    def full_like(self, x: Value, number: float) -> Value:
        """Return a value with the shape of x and with `number` as each element.

        Only the shape of x is read. The alternative, `x * 0 + number`, would be NaN where x is NaN or infinite.
        """
        size = x.apply("Shape", [x], lambda a: np.array(a.shape), None if x.sizes is None else (x.ndim,), np.int64)
        value = ir.tensor(np.array([number], dtype=x.dtype))
        return x.apply(
            "ConstantOfShape", [size], lambda a: np.full(a, number, x.dtype), x.sizes, attributes={"value": value}
        )


def concatenated(values: Sequence[Value], axis: int) -> Value:
    """Concatenate values along an axis. All values have the same dtype."""
    shape = None
    if all(value.sizes is not None for value in values):
        lengths = [value.shape[axis] for value in values]
        sizes = list(values[0].shape)
        sizes[axis] = None if None in lengths else sum(lengths)
        shape = tuple(sizes)
    return values[0].apply(
        "Concat", values, lambda *known: np.concatenate(known, axis), shape, attributes={"axis": axis}
    )


def _closed(sizes: Sequence[int]) -> Sequence[int]:
    """Check that no size is dynamic; return the sizes."""
    if any(size is None or size >= FREE for size in sizes):
        raise Unsayable("the formula creates a constant with a dynamic size")
    return sizes


def _each(op: str, f: Callable[..., Array], x: Operand) -> Operand:
    return x.apply(op, [x], f, x.sizes) if isinstance(x, Value) else f(x)


def _constant(like: Value, array: Array) -> Value:
    return Value(like.branch, array.shape, like.dtype, None, lambda: array)


SYMBOLS = Symbols()


# Graph values with the operators of numpy and torch that formulas use; each operator appends a node.
# If a value is constant, numpy can also compute operations that no node computes. `namespace()` finds the functions of
# `SYMBOLS` through `__array_namespace__`.


class Value:
    """A tensor of the graph.

    Args:
        branch: collects the nodes that operators append.
        shape: the sizes of the tensor; None if the number of axes is unknown.
        dtype: the numpy dtype of the tensor.
        value: the tensor's value in the graph. If None, an initializer is created from `known` when it is needed.
        known: a function that returns the tensor's elements; None if they depend on the graph's inputs.
    """

    __array_ufunc__ = None  # Makes numpy defer to this class when an array is the left operand.
    __slots__ = ("_numbers", "_value", "branch", "device", "dtype", "known", "sizes")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, branch: Branch, shape: Sequence[int | None] | None, dtype: Kind, value: ir.Value | None = None,
        known: Callable[[], Array] | None = None,
    ) -> None:  # fmt: skip
        self.branch, self.dtype, self.known, self._value = branch, np.dtype(dtype), known, value
        self.sizes: Sizes | None = None if shape is None else tuple(shape)
        self.device = "cpu"
        self._numbers: Array | None = None

    def __array_namespace__(self, api_version: str | None = None) -> Symbols:
        return SYMBOLS

    @property
    def value(self) -> ir.Value:
        """The tensor's value in the graph; the first access may add an initializer."""
        if self._value is None:
            building = self.branch.building
            self._value = building.tensor(building.keep(self), f"{self.branch.name}.constant", self.numbers)
        return self._value

    def numbers(self) -> Array:
        """Return the elements of a constant tensor.

        Raises:
            Unsayable: the elements depend on the graph's inputs.
        """
        if self.known is None:
            raise Unsayable("the formula needs the elements of a tensor before the graph runs")
        if self._numbers is None:
            self._numbers = np.asarray(self.known()).astype(self.dtype, copy=False)
        return self._numbers

    @property
    def shape(self) -> tuple[Any, ...]:
        if self.sizes is None:
            raise Unsayable("the graph does not show how many axes a value has")
        return self.sizes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        size = self.shape[0] if self.shape else None
        if size is None:
            raise Unsayable("the formula needs the length of a first axis that is missing or has an unknown size")
        return int(size)

    def __iter__(self) -> Iterator[Value]:
        return (self[position] for position in range(len(self)))

    def __array__(self, *_: object, **__: object) -> Array:
        raise Unsayable("the formula converts a graph value to an array of numpy or another library")

    def tolist(self) -> object:
        return self.numbers().tolist()

    def __float__(self) -> float:
        return float(self.numbers())

    def __bool__(self) -> bool:
        return bool(self.numbers())

    def apply(
        self, op: str, inputs: Sequence[object], f: Callable[..., Array], shape: Sizes | None,
        dtype: Kind | None = None, attributes: Mapping[str, Attribute] | None = None,
        more: Sequence[ir.Value | None] = (),
    ) -> Value:  # fmt: skip
        """Append a node that reads `inputs` and `more`; return its output.

        `f` computes the same output with numpy, and takes only `inputs`.
        """
        values = [self.like(one) for one in inputs]
        kind = self.dtype if dtype is None else dtype
        out = self.branch.node(op, [*(v.value for v in values), *more], attributes, kind, shape)
        known = (lambda: f(*(v.numbers() for v in values))) if all(v.known for v in values) else None
        return Value(self.branch, shape, kind, out, known)

    def like(self, other: object) -> Value:
        """Return an operand as a `Value`. A number or an array becomes a constant.

        The constant gets the dtype of this value, but boolean constants stay boolean. If this value is boolean, integer
        constants become int64.
        """
        if isinstance(other, Value):
            return other
        if isinstance(other, int) and other >= FREE:
            raise Unsayable("the formula uses a dynamic size as a number")
        array = np.asarray(other)
        if self.dtype == bool and array.dtype.kind not in "biu":
            raise Unsayable("the formula combines a boolean value with floating-point numbers")
        kind = np.dtype(np.int64) if self.dtype == bool else self.dtype
        array = array if array.dtype == bool else array.astype(kind)
        return Value(self.branch, array.shape, array.dtype, self.branch.building.literal(array), lambda: array)

    def _binary(self, op: str, one: object, two: object, f: Callable[..., Array], dtype: Kind | None = None) -> Value:
        a, b = self.like(one), self.like(two)
        a, b = (b.cast(a.dtype) if v is b and b.dtype == bool else v for v in (a, b))
        if a.dtype == bool and b.dtype != bool:
            a = a.cast(b.dtype)
        _same_type(a, b)
        return a.apply(op, [a, b], f, broadcast(a.sizes, b.sizes), dtype)

    def __add__(self, other: object) -> Value:
        return self._binary("Add", self, other, operator.add)

    def __radd__(self, other: object) -> Value:
        return self._binary("Add", other, self, operator.add)

    def __sub__(self, other: object) -> Value:
        return self._binary("Sub", self, other, operator.sub)

    def __rsub__(self, other: object) -> Value:
        return self._binary("Sub", other, self, operator.sub)

    def __mul__(self, other: object) -> Value:
        return self._binary("Mul", self, other, operator.mul)

    def __rmul__(self, other: object) -> Value:
        return self._binary("Mul", other, self, operator.mul)

    def __truediv__(self, other: object) -> Value:
        return self._binary("Div", self, other, operator.truediv)

    def __rtruediv__(self, other: object) -> Value:
        return self._binary("Div", other, self, operator.truediv)

    def __pow__(self, exponent: object) -> Value:
        if isinstance(exponent, float) and exponent == 0.5:
            return self.apply("Sqrt", [self], np.sqrt, self.sizes)
        return self._binary("Pow", self, exponent, operator.pow)

    def __neg__(self) -> Value:
        return self.apply("Neg", [self], lambda array: -array, self.sizes)

    def __abs__(self) -> Value:
        return self.apply("Abs", [self], np.abs, self.sizes)

    def __gt__(self, other: object) -> Value:
        return self._binary("Greater", self, other, operator.gt, bool)

    def __lt__(self, other: object) -> Value:
        return self._binary("Less", self, other, operator.lt, bool)

    def __ge__(self, other: object) -> Value:
        return self._binary("GreaterOrEqual", self, other, operator.ge, bool)

    def __le__(self, other: object) -> Value:
        return self._binary("LessOrEqual", self, other, operator.le, bool)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._binary("Equal", self, other, operator.eq, bool)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return ~(self == other)

    def __and__(self, other: object) -> Value:
        return self._binary("And", self, other, operator.and_, bool)

    def __invert__(self) -> Value:
        return self.apply("Not", [self], np.logical_not, self.sizes)

    def __matmul__(self, other: object) -> Value:
        a, b = self, self.like(other)
        _same_type(a, b)
        return a.apply("MatMul", [a, b], operator.matmul, multiplied(a.sizes, b.sizes))

    def __rmatmul__(self, other: object) -> Value:
        return self.like(other) @ self

    def cast(self, dtype: Kind) -> Value:
        """Return this value, cast to another dtype."""
        kind = np.dtype(dtype)
        if kind == self.dtype:
            return self
        to = int(ir.DataType.from_numpy(kind))
        return self.apply("Cast", [self], lambda array: array.astype(kind), self.sizes, kind, {"to": to})

    def transposed(self, order: Sequence[int]) -> Value:
        """Return the value with its axes in another order."""
        if list(order) == list(range(self.ndim)):
            return self
        shape = tuple(self.shape[axis] for axis in order)
        return self.apply("Transpose", [self], lambda a: a.transpose(order), shape, None, {"perm": list(order)})

    def swapaxes(self, one: int, two: int) -> Value:
        order = list(range(self.ndim))
        order[one], order[two] = order[two], order[one]
        return self.transposed(order)

    @property
    def mT(self) -> Value:  # noqa: N802 - the array libraries' name
        return self.swapaxes(-1, -2)

    def reshape(self, *shape: Any) -> Value:
        asked = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        wanted = filled(self.sizes, asked)
        if self.sizes == wanted and None not in wanted:
            return self
        literal = self.branch.building.literal(np.array(spelled(self.sizes, asked, wanted), dtype=np.int64))
        return self.apply("Reshape", [self], lambda a: a.reshape(wanted), wanted, more=[literal])

    def sum(self, axis: Axes = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceSum", np.sum, axis, keepdims, in_input=True)

    def mean(self, axis: Axes = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceMean", np.mean, axis, keepdims, in_input=self.branch.opset >= 18)

    def max(self, axis: Axes = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceMax", np.max, axis, keepdims, in_input=self.branch.opset >= 18)

    def cumsum(self, axis: int) -> Value:
        literal = self.branch.building.literal(np.array(axis, dtype=np.int64))
        return self.apply("CumSum", [self], lambda a: np.cumsum(a, axis), self.sizes, more=[literal])

    def argmax(self, axis: int) -> Value:
        shape, words = reduced(self.sizes, (axis,), False), {"axis": axis, "keepdims": 0}
        return self.apply("ArgMax", [self], lambda a: np.argmax(a, axis), shape, np.int64, words)

    def _reduced(self, op: str, f: Callable[..., Array], axis: Axes, keepdims: bool, in_input: bool) -> Value:
        axes = None if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
        attributes: dict[str, Attribute] = {"keepdims": int(keepdims)}
        # Axes are an input of ReduceSum since opset 13, and of the other reductions since opset 18.
        more: list[ir.Value | None] = []
        if axes is not None and in_input:
            more = [self.branch.building.literal(np.array(axes, dtype=np.int64))]
        elif axes is not None:
            attributes["axes"] = list(axes)
        shape = reduced(self.sizes, axes, keepdims)
        return self.apply(
            op, [self], lambda a: f(a, axis=axes, keepdims=keepdims), shape, attributes=attributes, more=more
        )

    def __getitem__(self, key: object) -> Value:
        return taken(self, key)

    def __setitem__(self, key: object, values: object) -> None:
        # Make this object refer to the new graph value, because a graph value cannot change.
        new = written(self, key, self.like(values))
        self._value, self.known, self._numbers = new._value, new.known, None

    def _no_node(self, *_: object) -> NoReturn:
        raise Unsayable("the formula uses a Python operator for which no ONNX node is known")

    __rshift__ = __or__ = __xor__ = __mod__ = __floordiv__ = __rxor__ = __rand__ = __rfloordiv__ = _no_node


def computed_over(update: Updates, f: Callable[[Leaf], Operand]) -> Updates:
    """Replace each tensor of an update by `f(tensor)`, an array or graph value that formulas can compute with."""
    return update.map(cast("Callable[[Leaf], Leaf]", f))


def plain(value: ir.Value, branch: Branch) -> Value:
    """Wrap a value of the graph in a `Value`, so that formulas can compute with it."""
    sizes = None if value.shape is None else tuple(s if isinstance(s, int) else None for s in value.shape)
    return Value(branch, sizes, element_type(value), value)


def _same_type(one: Value, two: Value) -> None:
    # Refuse different dtypes, which numpy would promote: ONNX operators need operands of one dtype.
    if one.dtype != two.dtype:
        raise Unsayable(f"the formula combines a {one.dtype} value with a {two.dtype} value")
