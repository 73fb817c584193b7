"""Graph values with the operators that formulas share with numpy and torch; each operator appends a node.

A value may also be known: its numbers can then be computed by the same operators in numpy, for operations without a
node. `namespace()` finds the functions of `symbols.py` through `__array_namespace__`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .building import Array, Branch, element_type
from .sizes import Sizes, Unsayable, broadcast, filled, multiplied, reduced, spelled


class Value:
    """A tensor of the graph.

    Args:
        branch: nodes are appended to it.
        shape: its sizes; None if not even their number is known.
        dtype: its numpy dtype.
        value: the tensor in the graph; if missing, it is created from the numbers on demand.
        known: returns its numbers; None if they depend on the graph's inputs.
    """

    __array_ufunc__ = None  # Makes numpy defer to this class when an array is the left operand.
    __slots__ = ("_numbers", "_value", "branch", "device", "dtype", "known", "sizes")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, branch: Branch, shape: Sequence[int | None] | None, dtype: Any, value: ir.Value | None = None,
        known: Callable[[], Array] | None = None,
    ) -> None:  # fmt: skip
        self.branch, self.dtype, self.known, self._value = branch, np.dtype(dtype), known, value
        self.sizes: Sizes | None = None if shape is None else tuple(shape)
        self.device = "cpu"
        self._numbers: Array | None = None

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        from .symbols import SYMBOLS

        return SYMBOLS

    @property
    def value(self) -> ir.Value:
        """The tensor in the graph."""
        if self._value is None:
            building = self.branch.building
            self._value = building.tensor(building.keep(self), f"{self.branch.name}.constant", self.numbers)
        return self._value

    def numbers(self) -> Array:
        """Return its numbers.

        Raises:
            Unsayable: they depend on the graph's inputs.
        """
        if self.known is None:
            raise Unsayable("its numbers are not known before the graph runs")
        if self._numbers is None:
            self._numbers = np.asarray(self.known()).astype(self.dtype, copy=False)
        return self._numbers

    @property
    def shape(self) -> tuple[Any, ...]:
        if self.sizes is None:
            raise Unsayable("the graph does not say how many axes it has")
        return self.sizes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        size = self.shape[0] if self.shape else None
        if size is None:
            raise Unsayable("the graph leaves this size open")
        return int(size)

    def __iter__(self) -> Iterator[Value]:
        return (self[position] for position in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise Unsayable("an array of another library")

    def tolist(self) -> Any:
        return self.numbers().tolist()

    def __float__(self) -> float:
        return float(self.numbers())

    def __bool__(self) -> bool:
        return bool(self.numbers())

    def apply(
        self, op: str, inputs: Sequence[Any], f: Callable[..., Any], shape: Sizes | None, dtype: Any = None,
        attributes: dict[str, Any] | None = None, more: Sequence[ir.Value | None] = (),
    ) -> Value:  # fmt: skip
        """Append a node and return its output. `f` computes it in numpy; `more` are inputs that `f` does not take."""
        values = [self.like(one) for one in inputs]
        kind = self.dtype if dtype is None else dtype
        out = self.branch.node(op, [*(v.value for v in values), *more], attributes, kind, shape)
        known = (lambda: f(*(v.numbers() for v in values))) if all(v.known for v in values) else None
        return Value(self.branch, shape, kind, out, known)

    def like(self, other: Any) -> Value:
        """Return another operand as a value; numbers become a constant of this value's dtype."""
        if isinstance(other, Value):
            return other
        array = np.asarray(other)
        if self.dtype == bool and array.dtype.kind not in "biu":
            raise Unsayable("a truth value beside a fraction")
        kind = np.dtype(np.int64) if self.dtype == bool else self.dtype
        array = array if array.dtype == bool else array.astype(kind)
        return Value(self.branch, array.shape, array.dtype, self.branch.building.literal(array), lambda: array)

    def _binary(self, op: str, one: Any, two: Any, f: Callable[..., Any], dtype: Any = None) -> Value:
        a, b = self.like(one), self.like(two)
        a, b = (b.cast(a.dtype) if v is b and b.dtype == bool else v for v in (a, b))
        if a.dtype == bool and b.dtype != bool:
            a = a.cast(b.dtype)
        _same_type(a, b)
        return a.apply(op, [a, b], f, broadcast(a.sizes, b.sizes), dtype)

    def __add__(self, other: Any) -> Value:
        return self._binary("Add", self, other, operator.add)

    def __radd__(self, other: Any) -> Value:
        return self._binary("Add", other, self, operator.add)

    def __sub__(self, other: Any) -> Value:
        return self._binary("Sub", self, other, operator.sub)

    def __rsub__(self, other: Any) -> Value:
        return self._binary("Sub", other, self, operator.sub)

    def __mul__(self, other: Any) -> Value:
        return self._binary("Mul", self, other, operator.mul)

    def __rmul__(self, other: Any) -> Value:
        return self._binary("Mul", other, self, operator.mul)

    def __truediv__(self, other: Any) -> Value:
        return self._binary("Div", self, other, operator.truediv)

    def __rtruediv__(self, other: Any) -> Value:
        return self._binary("Div", other, self, operator.truediv)

    def __pow__(self, exponent: Any) -> Value:
        if isinstance(exponent, float) and exponent == 0.5:
            return self.apply("Sqrt", [self], np.sqrt, self.sizes)
        return self._binary("Pow", self, exponent, operator.pow)

    def __neg__(self) -> Value:
        return self.apply("Neg", [self], operator.neg, self.sizes)

    def __abs__(self) -> Value:
        return self.apply("Abs", [self], np.abs, self.sizes)

    def __gt__(self, other: Any) -> Value:
        return self._binary("Greater", self, other, operator.gt, bool)

    def __lt__(self, other: Any) -> Value:
        return self._binary("Less", self, other, operator.lt, bool)

    def __ge__(self, other: Any) -> Value:
        return self._binary("GreaterOrEqual", self, other, operator.ge, bool)

    def __le__(self, other: Any) -> Value:
        return self._binary("LessOrEqual", self, other, operator.le, bool)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._binary("Equal", self, other, operator.eq, bool)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return ~(self == other)

    def __and__(self, other: Any) -> Value:
        return self._binary("And", self, other, operator.and_, bool)

    def __invert__(self) -> Value:
        return self.apply("Not", [self], np.logical_not, self.sizes)

    def __matmul__(self, other: Any) -> Value:
        a, b = self, self.like(other)
        _same_type(a, b)
        return a.apply("MatMul", [a, b], operator.matmul, multiplied(a.sizes, b.sizes))

    def __rmatmul__(self, other: Any) -> Value:
        return self.like(other) @ self

    def cast(self, dtype: Any) -> Value:
        """Return the same numbers in another dtype."""
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

    def sum(self, axis: Any = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceSum", np.sum, axis, keepdims, in_input=True)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceMean", np.mean, axis, keepdims, in_input=self.branch.opset >= 18)

    def max(self, axis: Any = None, keepdims: bool = False) -> Value:
        return self._reduced("ReduceMax", np.max, axis, keepdims, in_input=self.branch.opset >= 18)

    def cumsum(self, axis: int) -> Value:
        literal = self.branch.building.literal(np.array(axis, dtype=np.int64))
        return self.apply("CumSum", [self], lambda a: np.cumsum(a, axis), self.sizes, more=[literal])

    def argmax(self, axis: int) -> Value:
        shape, words = reduced(self.sizes, (axis,), False), {"axis": axis, "keepdims": 0}
        return self.apply("ArgMax", [self], lambda a: np.argmax(a, axis), shape, np.int64, words)

    def _reduced(self, op: str, f: Callable[..., Any], axis: Any, keepdims: bool, in_input: bool) -> Value:
        axes = None if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
        attributes: dict[str, Any] = {"keepdims": int(keepdims)}
        # ReduceSum takes its axes as an input since opset 13, the other reductions since opset 18.
        more: list[ir.Value | None] = []
        if axes is not None and in_input:
            more = [self.branch.building.literal(np.array(axes, dtype=np.int64))]
        elif axes is not None:
            attributes["axes"] = list(axes)
        shape = reduced(self.sizes, axes, keepdims)
        return self.apply(
            op, [self], lambda a: f(a, axis=axes, keepdims=keepdims), shape, attributes=attributes, more=more
        )

    def __getitem__(self, key: Any) -> Value:
        from .indexing import taken

        return taken(self, key)

    def __setitem__(self, key: Any, values: Any) -> None:
        from .indexing import written

        # Graph values cannot change. The assignment makes this object stand for the new value instead.
        new = written(self, key, self.like(values))
        self._value, self.known, self._numbers = new._value, new.known, None

    def _no_node(self, *_: Any) -> Any:
        raise Unsayable("no node says this")

    __rshift__ = __or__ = __xor__ = __mod__ = __floordiv__ = __rxor__ = __rand__ = __rfloordiv__ = _no_node


def plain(value: ir.Value, branch: Branch) -> Value:
    """Return a graph value with the operators of formulas."""
    sizes = None if value.shape is None else tuple(s if isinstance(s, int) else None for s in value.shape)
    return Value(branch, sizes, element_type(value), value)


def _same_type(one: Value, two: Value) -> None:
    # ONNX operators need operands of one type, where numpy would promote.
    if one.dtype != two.dtype:
        raise Unsayable(f"{one.dtype} beside {two.dtype}")
