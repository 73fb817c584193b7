"""Merging into graphs: adapters folded into the weights of the layers that they name, and into no other's.

A stored tensor that other layers read too, because it is tied or because an exporter stored equal ones once, stays as
it is for those: the layer gets its own. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..adapter import Adapter
from ..errors import Malformed, NotMergeable, Unsupported, UsageError
from ..merging.folds import Fold as Folded
from ..tensors.lazy import as_array
from ..updates import Update
from .building import Array, Branch, Building
from .changes import Change, Stored, exchange, fresh_value, from_array, lazy_of, settle, stored_behind
from .injecting import Report, loaded
from .model_file import opened, save_merged
from .operands import numbers, shape_of
from .resolving import Found, Spot, resolve

if TYPE_CHECKING:
    from .injecting import Base, Model

    Source = Adapter | str | PathLike[str]

Fold = tuple[Found, float]
"""A target of one adapter, and that adapter's weight."""


def merge(
    model: Model,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    check: bool = True,
) -> Report:
    """Folds adapters into the weights of a graph: W' = W + sum_i weight_i * (f_i(W) - W), rounded once.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. A model with numbers in data files gets one new data file beside it.
        weights: one factor an adapter; 1 for each when not given.
        base_weights: the weights that the graph was exported from: finds layers whose names are lost.
        check: run the result with onnxruntime against the model with the adapters injected.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        NotMergeable: an update's law is not one of weights.
        Unsupported: a weight is not stored as real numbers.
        Malformed: the file is no model, or a result does not fit its type.
    """
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    factors = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
    if not several or len(factors) != len(several) or not np.isfinite(factors).all():
        raise UsageError(f"{len(factors)} weights for {len(several)} adapters", cure="Give one number an adapter")
    source = opened(model)
    folds: list[Fold] = []
    read = []
    for adapter, factor in zip(several, factors, strict=True):
        known, base = loaded(adapter, base_weights)
        _refuse(known)
        read.append(known)
        folds += [(place, factor) for place in resolve(source.model, known, base)]
    building = Building(source.model)
    changed = fold(folds, building)
    building.settle()
    files = save_merged(source.model, source, Path(out), changed)
    report = Report(Path(out), tuple(files), tuple(place for place, _ in folds))
    if not check:
        return report
    from .checking import checked_merge

    difference, note = checked_merge(model, read, factors, base_weights, Path(out), files)
    return Report(report.out, report.files, report.found, difference, note)


def fold(folds: Sequence[Fold], building: Building) -> list[ir.Value]:
    """Gives every layer that is named its own changed weight and bias; returns the new values, their numbers lazy."""
    fresh: dict[tuple[Any, ...], ir.Value] = {}
    for spot in dict.fromkeys(spot for place, _ in folds for spot in place.spots):
        at = [(place, factor) for place, factor in folds if spot in place.spots]
        _fold_spot(spot, at, building, fresh)
    settle(fresh.values())
    return list(fresh.values())


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind in ("output", "context"):
            why = f"{update.method} changes {update.acts_on}, not its weights"
            raise NotMergeable(why, where=str(target), cure="Inject it instead")


def _fold_spot(spot: Spot, at: list[Fold], building: Building, fresh: dict[tuple[Any, ...], ir.Value]) -> None:
    layer = spot.kind(spot.node, Branch(building, "merge"))
    held: ir.Value = layer.operand
    updates = [update for place, _ in at for update in place.updates]
    if any(_packed(source) for source in spot.sources):
        raise Unsupported("a quantized weight", where=str(at[0][0].asked), cure="Inject instead of merging")
    bias = layer.own_bias if layer.after is None else layer.after[1]
    lost = [update for update in updates if update.changes_bias and update.needs_bias]
    if lost and bias is None:
        cure = "Inject it instead of merging"
        raise NotMergeable("changes a bias that the layer does not have", where=str(at[0][0].asked), cure=cure)
    key = tuple((id(place), factor) for place, factor in at)
    if bias is not None and any(update.changes_bias for update in updates):
        name, kind = str(at[0][0].asked), bias.dtype or ir.DataType.FLOAT
        numbers_of = partial(_bias, spot, at, held, bias)
        change = Change(name, from_array(lambda: _rounded(numbers_of(), kind, name), shape_of(bias), kind), ())
        new = fresh_value(building, fresh, ("bias", id(bias), id(held), *key), bias, change)
        holder = spot.node if layer.after is None else layer.after[0]
        holder.replace_input_with(list(holder.inputs).index(bias), new)
    if any(update.changes_weight for update in updates):
        stored = stored_behind(held)
        folds = tuple(_stored(place, factor, spot, stored) for place, factor in at)
        change = Change(str(at[0][0].asked), lazy_of(stored.value), folds)
        new = fresh_value(building, fresh, ("weight", id(stored.value), *key), stored.value, change)
        exchange(spot.node, spot.kind.position, stored, new, building)


def _packed(source: ir.Value) -> bool:
    kind = source.const_value.dtype if source.const_value is not None else source.dtype
    return kind is not None and not kind.is_floating_point() and len(shape_of(source)) > 1


def _stored(place: Found, factor: float, spot: Spot, stored: Stored) -> Folded:
    """A target's updates of a weight in the order in which its numbers are stored."""
    turned = (spot.kind.turns(spot.node) != place.turned) != stored.turned
    target = replace(place.target, layout="in out *k" if turned else "out *in")
    updates = tuple(update for update in place.updates if update.changes_weight)
    return Folded(target, updates, factor, 0, False, shape_of(stored.value))


def _bias(spot: Spot, at: list[Fold], held: ir.Value, bias: ir.Value) -> Array:
    """b' as the node takes it, in float64."""
    before = numbers(bias).astype(np.float64)
    flat, after = before.reshape(-1), before.reshape(-1).copy()
    needs = any(update.bias_sees_weight for place, _ in at for update in place.updates)
    W = _seen(numbers(held).astype(np.float64), spot) if needs else None
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        seen = None if W is None else _part(W, place)
        after[rows] += factor * (_through(place, seen, flat[rows])[1] - flat[rows])
    return after.reshape(before.shape)


def _through(place: Found, W: Any, b: Any = None) -> tuple[Any, Any]:
    """W and b after a target's updates in order."""
    for update in place.updates:
        loaded = _wide(update)
        loaded = loaded.settled(W) if b is not None and loaded.bias_sees_weight else loaded
        b = loaded.new_bias(b) if b is not None else b
        W = loaded.new_weight(W) if W is not None and loaded.changes_weight else W
    return W, b


def _wide(update: Update) -> Update:
    def wide(leaf: Any) -> Any:
        array = as_array(leaf)
        return array if array.dtype.kind in "iub" else array.astype(np.float64)

    return update.map(wide)


def _seen(W: Array, spot: Spot) -> Array:
    return W.swapaxes(0, 1) if spot.kind.turns(spot.node) else W


def _part(W: Array, place: Found) -> Array:
    W = W.swapaxes(0, 1) if place.turned else W
    return W[slice(*place.target.rows)] if place.target.rows else W


def _rounded(array: Array, kind: ir.DataType, name: str) -> Array:
    if array.dtype == kind.numpy():
        return array
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array).astype(kind.numpy())
    if not np.isfinite(out.astype(np.float64)).all() and np.isfinite(array).all():
        cure = "Merge with a smaller weight"
        raise Malformed(f"merging gives values that {kind.name} cannot hold", where=name, cure=cure)
    return out
