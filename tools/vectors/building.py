"""What cases are built of: cases, updates, the targets they lie at, and tensors that several methods have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from container import numbers
from layers import Array, Layer, convolution, embedding, experts, gain, linear, transposed_convolution

Pair = tuple[Array, Array | None]
"""W `[out, in, *k]`, and b `[out]` or None: what a formula takes and returns."""


@dataclass(frozen=True)
class Update:
    """One update of a case: tensors and attributes by field; attributes that are left out have their defaults."""

    method: str
    tensors: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One target of a vector.

    Attributes:
        name: the target's path; empty for the whole model.
        weight: shape of the base's weight as it is stored; empty where there is none to see.
        updates: in order of application.
        bias: shape of the base's bias, if it has one.
        layout: how the weight is stored.
        rows: the slice of `out` that the updates see.
        x: shape of the input; None for token numbers.
        layer: what the layer does with input and weight.
        dtype: element type of the adapter's tensors; integers are I64 unless given as int32.
        beside: shapes of what else a formula on outputs sees, by name: a residual, the norm after it.
        call: what the model's call brought, by name, where the formula asks for it.
    """

    name: str
    weight: tuple[int, ...]
    updates: tuple[Update, ...]
    bias: tuple[int, ...] | None = None
    layout: str = "out *in"
    rows: tuple[int, int] | None = None
    x: tuple[int, ...] | None = (2, 5)
    layer: Layer = linear
    dtype: str = "F64"
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)
    call: dict[str, Array] = field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        return self.layout.startswith("e ")


def update(method: str, seed: str, /, scaling: float | None = None, **shapes: tuple[int, ...]) -> Update:
    """An update of tensors of the given shapes; without a scaling it has no attributes."""
    tensors = {name: numbers(f"{seed}.{name}", *shape) for name, shape in shapes.items()}
    return Update(method, tensors, {} if scaling is None else {"scaling": scaling})


def contextual(
    method: str, name: str, /, dtype: str = "F64", attributes: dict[str, Any] | None = None, **shapes: Any
) -> Case:
    """A case of one update of the model's context: no weight, no input; tensors of the given shapes, or given."""
    tensors = {
        field: numbers(f"{method}.{name}.{field}", *shape) if isinstance(shape, tuple) else shape
        for field, shape in shapes.items()
    }
    return Case(name, (), (Update(method, tensors, attributes or {}),), dtype=dtype)


def low_rank(
    method: str,
    seed: str,
    out: int,
    *ins: int,
    r: int = 2,
    e: int | None = None,
    scaling: float | None = 0.5,
    **others: Array,
) -> Update:
    """An update with A `[r, *ins]`, B `[out, r]` and `others`, which may take A's or B's place; `e` makes a stack."""
    lead = () if e is None else (e,)
    made = update(method, seed, scaling, A=(*lead, r, *ins), B=(*lead, out, r))
    return Update(method, made.tensors | others, made.attributes)


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
