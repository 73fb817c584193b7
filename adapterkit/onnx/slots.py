"""Slots: an adapter's tensors as inputs of the graph that may be left out, so that adapters are exchanged at run time.

A slot's default changes nothing: inner sizes, such as the rank, are 0 there, and are open at run time. Factors such as
`scaling` are slots of one number. A formula runs once over such values; sizes that are open in it are told apart by
numbers that nothing else is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..errors import Unsupported
from ..shapes import Axes
from ..tensors.lazy import as_array, from_numpy
from ..updates import OutputUpdate, Update
from .building import Array, Building
from .layers import Layer
from .resolving import Found
from .sizes import FREE
from .values import Value

FIXED = frozenset({"out", "in", "k", "rest", "columns", "hidden", "first", "second", "outs", "ins", "shorts", "longs"})
"""Axes whose size the base gives, or that all layers share."""


class Slots:
    """Makes slots, and keeps what an adapter puts into each.

    Args:
        adapter: the adapter whose tensors tell which slots there are.
        building: what the model gets.

    Attributes:
        feeds: name of a slot -> this adapter's numbers.
    """

    def __init__(self, adapter: Adapter, building: Building) -> None:
        self.building = building
        self.feeds: dict[str, Array] = {}
        self.free: dict[str, int] = {}

    def opened(self, update: Update, layer: Layer, place: Found, position: int) -> Update:
        """The update over slots.

        Raises:
            Unsupported: nothing that its tensors could be leaves the base as it is, or its law asks the model's call.
        """
        if isinstance(update, OutputUpdate) and update.asks:
            why = f"slots for {update.method}, whose law asks the model's call for {', '.join(update.asks)}"
            raise Unsupported(why, where=str(place.asked), cure="Inject it as constants")
        shapes = {name: self._shape(update, name, leaf) for name, leaf in update.tensors.items()}
        defaults = _neutral(update, shapes, place)
        stem = stem_of(place, position)
        made: dict[str, Any] = {
            name: self._slot(f"{stem}.{name}", update.tensors[name], shapes[name], default, layer)
            for name, default in defaults.items()
        }
        if isinstance(getattr(update, "scaling", None), float | int):
            number = from_numpy(np.array([update.attributes["scaling"]]))
            made["scaling"] = self._slot(f"{stem}.scaling", number, (1,), np.ones(1), layer)
        return update.replace(**made)

    def _shape(self, update: Update, name: str, leaf: Any) -> tuple[int, ...]:
        """The sizes of a tensor, those that are open as numbers from FREE on."""
        axes: Axes = update.tensor_fields()[name].metadata["axes"]
        if any(axis.startswith("*") for axis in axes.axes):
            extra = len(leaf.shape) - len(axes.axes) + 1
            at = axes.star or 0
            names = [*axes.axes[:at], *[""] * extra, *axes.axes[at + 1 :]]
        else:
            names = list(axes.axes)
        return tuple(
            self._open(axis) if axis.isidentifier() and axis not in FIXED else size
            for axis, size in zip(names, leaf.shape, strict=True)
        )

    def _open(self, axis: str) -> int:
        return self.free.setdefault(axis, FREE + len(self.free))

    def _slot(self, name: str, leaf: Any, shape: tuple[int, ...], default: Array, layer: Layer) -> Value:
        names = {size: axis for axis, size in self.free.items()}
        declared = [f"{name}.{names[size]}" if size in names else size for size in shape]
        array = as_array(leaf)
        kind = layer.dtype if array.dtype.kind not in "iu" else array.dtype
        key = self.building.keep(leaf), kind.str
        held = self.building.slot(key, name, default.astype(kind), declared)
        self.feeds[held.name or name] = array.astype(kind)
        return Value(layer.branch, shape, kind, held)


def stem_of(place: Found, position: int) -> str:
    """The first part of the names of an update's slots; a dot and a tensor's name, or `scaling`, go behind it."""
    one = "" if len(place.updates) == 1 else f".{position}"
    return f"{place.target}{one}.{place.updates[position].method}"


def _neutral(update: Update, shapes: dict[str, tuple[int, ...]], place: Found) -> dict[str, Array]:
    """Numbers for an update's tensors with which it changes nothing, bit for bit.

    Raises:
        Unsupported: none of those that are tried do that.
    """
    for fill in (0.0, 1.0):
        # Where a formula's own arithmetic has no words for nothing, a single row of zeros stands for it.
        if any(_changes_nothing(update, _filled(update, shapes, inner, fill), place) for inner in (0, 1)):
            return _filled(update, shapes, 0, fill)
    why = f"no tensors of {update.method} leave the base as it is"
    raise Unsupported(why, where=str(place.asked), cure="Inject it as constants")


def _filled(update: Update, shapes: dict[str, tuple[int, ...]], inner: int, fill: float) -> dict[str, Array]:
    """Tensors of one number, with open sizes of `inner`."""
    made = {}
    for name, leaf in update.tensors.items():
        kind = np.int64 if as_array(leaf).dtype.kind in "iu" else np.float64
        made[name] = np.full([inner if size >= FREE else size for size in shapes[name]], fill, dtype=kind)
    return made


def _changes_nothing(update: Update, tensors: dict[str, Array], place: Found) -> bool:
    shape = place.shape
    seen = (shape[1], shape[0], *shape[2:]) if place.turned else shape
    rows = place.target.rows
    seen = (rows[1] - rows[0], *seen[1:]) if rows else seen
    changes: dict[str, Any] = {"scaling": 1.0} if "scaling" in update.attribute_fields() else {}
    trial = update.replace(**tensors, **changes)
    try:
        if isinstance(update, OutputUpdate):
            return _same_output(trial, seen)
        W: Any = np.random.default_rng(0).normal(size=seen)
        b: Any = np.random.default_rng(1).normal(size=seen[0])
        settled = trial.settled(W) if trial.bias_sees_weight else trial
        new_W = trial.new_weight(W) if trial.changes_weight else W
        return bool((np.asarray(new_W) == W).all() and (np.asarray(settled.new_bias(b)) == b).all())
    except (ArithmeticError, AttributeError, ValueError, TypeError, IndexError, np.linalg.LinAlgError):
        return False


class _Stub:
    """A layer of numbers alone, to try an output update on."""

    channel = -1

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.W: Any = np.random.default_rng(0).normal(size=(shape[0], math.prod(shape[1:])))

    def __call__(self, x: Any) -> Any:
        return x @ self.W.mT

    hidden = __call__

    def residual(self, x: Any) -> None:
        return None

    def norm(self, h: Any) -> Any:
        return h

    def close(self, h: Any, x: Any, whole: bool = True) -> Any:
        return h

    def mix(self, h: Any, w: Any) -> Any:
        return h @ w.mT

    def per_channel(self, v: Any) -> Any:
        return v


def _same_output(update: Update, shape: tuple[int, ...]) -> bool:
    stub = _Stub(shape)
    x = np.random.default_rng(2).normal(size=(2, 3, stub.W.shape[1]))
    return bool((update.forward(x, stub) == stub(x)).all())
