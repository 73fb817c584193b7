"""The array-API functions over graph values: what `namespace(value)` gives a formula.

Operands may also be numpy arrays; without any graph value, numpy computes the result. Linear algebra has no nodes, so
it is computed if the numbers are known. https://data-apis.org/array-api/latest/
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir

from .sizes import FREE, Unsayable, broadcast
from .values import Value

arrays: Any = import_module("array_api_compat.numpy")


class _Linalg:
    """Decompositions and solvers, computed in float64."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        f = getattr(np.linalg, name)

        def worked_out(*operands: Any, **options: Any) -> Any:
            first = next((one for one in operands if isinstance(one, Value)), None)
            if first is None:
                return f(*operands, **options)
            known = [one.numbers() if isinstance(one, Value) else one for one in operands]
            results = f(*(np.asarray(array, dtype=np.float64) for array in known), **options)
            if isinstance(results, tuple):
                return tuple(_constant(first, array) for array in results)
            return _constant(first, results)

        return worked_out


class Symbols:
    """The namespace; functions that it lacks raise `Unsayable`."""

    __name__ = __name__  # array_api_compat identifies namespaces by their names.
    float32, float64, float16, int64, inf = np.float32, np.float64, np.float16, np.int64, np.inf
    linalg = _Linalg()

    def arange(self, *limits: Any, **kind: Any) -> Any:
        return arrays.arange(*_closed(limits), **kind)

    def eye(self, *sizes: Any, **kind: Any) -> Any:
        return arrays.eye(*_closed(sizes), **kind)

    def zeros(self, shape: Any, **kind: Any) -> Any:
        return arrays.zeros(_closed(shape), **kind)

    def ones(self, shape: Any, **kind: Any) -> Any:
        return arrays.ones(_closed(shape), **kind)

    def finfo(self, dtype: Any) -> Any:
        return import_module("ml_dtypes").finfo(dtype)

    def __getattr__(self, name: str) -> Any:
        raise Unsayable(f"no node says {name}")

    def astype(self, x: Any, dtype: Any) -> Any:
        return x.cast(dtype) if isinstance(x, Value) else np.asarray(x).astype(dtype)

    def where(self, condition: Any, one: Any, two: Any) -> Any:
        like = next((v for v in (one, two, condition) if isinstance(v, Value)), None)
        if like is None:
            return np.where(condition, one, two)
        first, second = like.like(one), like.like(two)
        choice = like.like(condition)
        shape = broadcast(broadcast(choice.sizes, first.sizes), second.sizes)
        return first.apply("Where", [choice, first, second], np.where, shape)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        if low is not None:
            x = x.apply("Max", [x, low], np.maximum, x.sizes)
        return x if high is None else x.apply("Min", [x, high], np.minimum, x.sizes)

    def exp(self, x: Any) -> Any:
        return _each("Exp", np.exp, x)

    def log1p(self, x: Any) -> Any:
        # ONNX has no Log1p.
        return _each("Log", np.log, 1 + x)

    def expm1(self, x: Any) -> Any:
        # ONNX has no Expm1.
        return self.exp(x) - 1

    def tanh(self, x: Any) -> Any:
        return _each("Tanh", np.tanh, x)

    def cos(self, x: Any) -> Any:
        return _each("Cos", np.cos, x)

    def sin(self, x: Any) -> Any:
        return _each("Sin", np.sin, x)

    def abs(self, x: Any) -> Any:
        return _each("Abs", np.abs, x)

    def sqrt(self, x: Any) -> Any:
        return _each("Sqrt", np.sqrt, x)

    def erf(self, x: Any) -> Any:
        return _each("Erf", np.vectorize(math.erf), x)

    def sum(self, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        return x.sum(axis, keepdims)

    def mean(self, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        return x.mean(axis, keepdims)

    def max(self, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        return x.max(axis, keepdims)

    def cumulative_sum(self, x: Any, axis: int) -> Any:
        return x.cumsum(axis)

    def argsort(self, x: Any, axis: int = -1) -> Any:
        """Return the positions in ascending order; equal entries keep their order."""
        if x.shape[axis] is None or x.shape[axis] >= FREE:
            raise Unsayable("an order of an open number of entries")
        count = x.branch.building.literal(np.array([x.shape[axis]], dtype=np.int64))
        words = {"axis": axis, "largest": 0}
        # ONNX has no ArgSort. TopK of all entries sorts them, and puts the lower index first for ties.
        node = x.branch.node("TopK", [x.value, count], words, np.int64, x.sizes, position=1)
        known = (lambda: np.argsort(x.numbers(), axis, kind="stable")) if x.known else None
        return Value(x.branch, x.sizes, np.int64, node, known)

    def take_along_axis(self, x: Any, indices: Any, axis: int) -> Any:
        return x.apply(
            "GatherElements", [x, indices], lambda a, at: np.take_along_axis(a, at, axis), indices.sizes,
            attributes={"axis": axis},
        )  # fmt: skip

    def reshape(self, x: Any, shape: Any) -> Any:
        return x.reshape(shape)

    def moveaxis(self, x: Any, source: int, destination: int) -> Any:
        if source == destination:
            return x
        order = [axis for axis in range(x.ndim) if axis != source % x.ndim]
        order.insert(destination % x.ndim, source % x.ndim)
        return x.transposed(order)

    def permute_dims(self, x: Any, order: Any) -> Any:
        return x.transposed(order)

    def concat(self, parts: Any, axis: int = 0) -> Any:
        like = next((one for one in parts if isinstance(one, Value)), None)
        if like is None:
            return np.concatenate(parts, axis)
        values = [like.like(one) for one in parts]
        shape = None
        if all(value.sizes is not None for value in values):
            lengths = [value.shape[axis] for value in values]
            sizes = list(values[0].shape)
            sizes[axis] = None if None in lengths else sum(lengths)
            shape = tuple(sizes)
        return like.apply(
            "Concat", values, lambda *known: np.concatenate(known, axis), shape, attributes={"axis": axis}
        )

    def stack(self, parts: Any, axis: int = 0) -> Any:
        if not any(isinstance(one, Value) for one in parts):
            return np.stack(parts, axis)
        place = axis if axis >= 0 else axis + 1 + parts[0].ndim
        return self.concat([one[(*[slice(None)] * place, None)] for one in parts], axis=place)

    def zeros_like(self, x: Any) -> Any:
        return self.full_like(x, 0)

    def ones_like(self, x: Any) -> Any:
        return self.full_like(x, 1)

    def full_like(self, x: Any, number: Any) -> Any:
        """Return an array filled with one number, which a product `x * 0` would not do for NaN and infinity."""
        size = x.apply("Shape", [x], lambda a: np.array(a.shape), None if x.sizes is None else (x.ndim,), np.int64)
        value = ir.tensor(np.array([number], dtype=x.dtype))
        return x.apply(
            "ConstantOfShape", [size], lambda a: np.full(a, number, x.dtype), x.sizes, attributes={"value": value}
        )


def _closed(sizes: Any) -> Any:
    """Return the sizes after checking that none is open."""
    if any(size is None or size >= FREE for size in sizes):
        raise Unsayable("a constant of an open size")
    return sizes


def _each(op: str, f: Callable[..., Any], x: Any) -> Any:
    return x.apply(op, [x], f, x.sizes) if isinstance(x, Value) else f(x)


def _constant(like: Value, array: Any) -> Value:
    return Value(like.branch, array.shape, like.dtype, None, lambda: array)


SYMBOLS = Symbols()
