"""The vectors of the methods: for each, a native adapter with one target a case, and a base with what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from vector_container import Stored, layout, native, numbers, pack, stored
from vector_formulas import (
    FORMULAS,
    Array,
    convolution,
    embedding,
    experts,
    gain,
    linear,
    transposed_convolution,
)

Update = tuple[str, dict[str, Array], dict[str, float]]
"""Method, tensors by field, attributes."""


@dataclass(frozen=True)
class Case:
    """One target of a vector.

    Attributes:
        name: the target's path.
        weight: shape of the base's weight as it is stored.
        updates: in order of application.
        bias: shape of the base's bias, if it has one.
        layout: how the weight is stored.
        rows: the slice of `out` that the updates see.
        x: shape of the input; None for token numbers.
        layer: what the layer does with input and weight.
        dtype: element type of the adapter's tensors; integers are I64 unless given as int32.
    """

    name: str
    weight: tuple[int, ...]
    updates: tuple[Update, ...]
    bias: tuple[int, ...] | None = None
    layout: str = "out *in"
    rows: tuple[int, int] | None = None
    x: tuple[int, ...] | None = (2, 5)
    layer: Callable[[Array, Array], Array] = linear
    dtype: str = "F64"

    @property
    def stacked(self) -> bool:
        return self.layout.startswith("e ")


def vectors(method: str, cases: list[Case]) -> dict[str, bytes]:
    """File name -> content of one method's vector."""
    expected: dict[str, Stored] = {}
    for case in cases:
        expected |= {f"{case.name}.{name}": value for name, value in _expected(case).items()}
    return {
        f"{method}.adapter.safetensors": _adapter(cases),
        f"{method}.expected.safetensors": pack(*layout(expected)),
    }


def _adapter(cases: list[Case]) -> bytes:
    tensors: dict[str, Stored] = {}
    names: dict[int, str] = {}
    updates = [_record(case, position, tensors, names) for case in cases for position in range(len(case.updates))]
    return native({"version": "1.0", "updates": updates}, tensors)


def _record(case: Case, position: int, tensors: dict[str, Stored], names: dict[int, str]) -> dict[str, Any]:
    """One update's record; an array that several updates hold is stored once."""
    method, fields, attributes = case.updates[position]
    for field, array in fields.items():
        if id(array) not in names:
            names[id(array)] = f"{case.name}.{position}.{field}"
            tensors[names[id(array)]] = stored(array, _dtype(array, case))
    target: dict[str, Any] = {"path": case.name, "layout": case.layout}
    if case.rows:
        target["rows"] = case.rows
    return {
        "target": target,
        "method": method,
        "version": 1,
        "tensors": {field: names[id(array)] for field, array in fields.items()},
        "attributes": attributes,
    }


def _dtype(array: Array, case: Case) -> str:
    return {"int32": "I32", "int64": "I64"}.get(str(array.dtype), case.dtype)


def _expected(case: Case) -> dict[str, Stored]:
    W = numbers(f"{case.name}.W", *case.weight)
    b = None if case.bias is None else numbers(f"{case.name}.b", *case.bias)
    new_W, new_b = _merge(case, _view(W, case.layout), b)
    x = np.array([1, 0, 3]) if case.x is None else numbers(f"{case.name}.x", *case.x)
    arrays = {"weight": W, "bias": b, "x": x, "merged.weight": _view(new_W, case.layout), "merged.bias": new_b}
    arrays["y"] = _output(case, x, new_W, new_b)
    return {
        name: stored(np.ascontiguousarray(a), "I64" if a.dtype == np.int64 else "F64")
        for name, a in arrays.items()
        if a is not None
    }


def _view(W: Array, stored_as: str) -> Array:
    """Stored to `[out, in, *k]` or `[e, out, in, *k]`, and back."""
    if stored_as == "in out *k":
        return W.swapaxes(0, 1)
    return W.swapaxes(1, 2) if stored_as == "e in out *k" else W


def _merge(case: Case, W: Array, b: Array | None) -> tuple[Array, Array | None]:
    if not case.stacked:
        return _merge_one(case, W, b, lambda array: array)
    parts = [
        _merge_one(case, W[e], None if b is None else b[e], lambda array, e=e: array[e]) for e in range(W.shape[0])
    ]
    return np.stack([W for W, _ in parts]), None if b is None else np.stack([b for _, b in parts])


def _merge_one(case: Case, W: Array, b: Array | None, pick: Callable[[Array], Array]) -> tuple[Array, Array | None]:
    start, stop = case.rows or (0, len(W))
    part, part_b = W[start:stop], None if b is None else b[start:stop]
    for method, fields, attributes in case.updates:
        values = {field: pick(array) for field, array in fields.items()}
        if method in ("lora", "dora", "dense"):
            values["scaling"] = attributes.get("scaling", 1.0)
        part, part_b = FORMULAS[method](part, part_b, **values)
    new_b = None if b is None else np.concatenate([b[:start], part_b, b[stop:]])
    return np.concatenate([W[:start], part, W[stop:]]), new_b


def _output(case: Case, x: Array, W: Array, b: Array | None) -> Array:
    y = case.layer(x, W)
    if b is None:
        return y
    if case.layer in (convolution, transposed_convolution):
        return y + b.reshape(-1, *[1] * (y.ndim - 2))
    return y + (b[:, None] if case.layer is experts else b)


LINEAR: dict[str, Any] = {"weight": (3, 5)}
BIASED: dict[str, Any] = {"weight": (3, 5), "bias": (3,)}
IN_OUT: dict[str, Any] = {"weight": (5, 3), "layout": "in out *k", "bias": (3,)}
FUSED: dict[str, Any] = {"weight": (9, 5), "bias": (9,), "rows": (3, 6)}
FUSED_IN_OUT: dict[str, Any] = {"weight": (5, 9), "layout": "in out *k", "bias": (9,), "rows": (3, 6)}
FUSED_EXPERTS: dict[str, Any] = {
    "weight": (2, 9, 5),
    "layout": "e out *in",
    "rows": (3, 6),
    "x": (2, 2, 5),
    "layer": experts,
}
CONV1D: dict[str, Any] = {"weight": (3, 2, 3), "x": (1, 2, 5), "layer": convolution}
CONV2D: dict[str, Any] = {"weight": (3, 2, 2, 3), "bias": (3,), "x": (1, 2, 4, 5), "layer": convolution}
TRANSPOSED: dict[str, Any] = {
    "weight": (2, 3, 2, 3),
    "layout": "in out *k",
    "bias": (3,),
    "x": (1, 2, 3, 2),
    "layer": transposed_convolution,
}
EMBEDDING: dict[str, Any] = {"weight": (6, 3), "layout": "in out *k", "x": None, "layer": embedding}
EXPERTS: dict[str, Any] = {"weight": (2, 3, 5), "layout": "e out *in", "x": (2, 2, 5), "layer": experts}
EXPERTS_IN_OUT: dict[str, Any] = {
    "weight": (2, 5, 3),
    "layout": "e in out *k",
    "bias": (2, 3),
    "x": (2, 2, 5),
    "layer": experts,
}
NORM: dict[str, Any] = {"weight": (3,), "bias": (3,), "x": (2, 3), "layer": gain}
