"""Merging into graphs: adapters folded into the weights of the layers that they name, and into no other's.

A stored tensor that other layers read too, because it is tied or because an exporter stored equal ones once, stays as
it is for those: the layer gets its own. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .model_file import kept, opened, save_merged
from .operands import held_apart, numbers, shape_of
from .packing import packing_of
from .recurrent import Recurrent
from .resolving import Found, Spot, resolve
from .unpacking import CHOICES, EXPLAINED, as_float, is_packed

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
    quantized: str | None = None,
    check: bool | Mapping[str, Any] = True,
) -> Report:
    """Folds adapters into the weights of a graph: W' = W + sum_i weight_i * (f_i(W) - W), rounded once.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. A model with numbers in data files gets one new data file beside it.
        weights: one factor an adapter; 1 for each when not given.
        base_weights: the weights that the graph was exported from: finds layers whose names are lost.
        quantized: where a weight is packed, `dequantize`: fold into the dequantized numbers and write a layer of
            floating point; `requantize`: quantize the result again in the same scheme; `Report.damage` tells what that
            did.
        check: run the result with onnxruntime against the model with the adapters injected; on these inputs, by name,
            or on inputs that are made up.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        NotMergeable: an update's law is not one of weights.
        Unsupported: a weight is packed and `quantized` does not say what to do, or in a way that is not known here.
        Malformed: the file is no model, or a result does not fit its type.
    """
    if quantized is not None and quantized not in CHOICES:
        raise UsageError(f"unknown choice {quantized!r}", where="quantized", cure=f"Known: {', '.join(CHOICES)}")
    source = opened(model)
    read, factors, folds = _resolved(source.model, adapters, weights, base_weights)
    building, damage = Building(source.model), dict[str, Mapping[str, float]]()
    changed = fold(folds, building, quantized, damage)
    building.settle()
    with kept(Path(out)) as files:
        files += save_merged(source.model, source, Path(out), changed)
        report = Report(Path(out), tuple(files), tuple(place for place, _ in folds), damage=damage)
        if check is False:
            return report
        given = None if isinstance(check, bool) else check
        from .checking import checked_merge

        told = checked_merge(model, read, factors, base_weights, Path(out), quantized, given)
    return replace(report, difference=told.difference, note=told.note, reference=told.reference)


def plan(
    model: Model,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
) -> tuple[Found, ...]:
    """Where `merge` would fold adapters into a graph; nothing is written.

    Raises:
        TargetNotFound, ShapeMismatch, NotMergeable, Malformed: as `merge`.
    """
    return tuple(place for place, _ in _resolved(opened(model).model, adapters, weights, base_weights)[2])


def _resolved(
    model: ir.Model,
    adapters: Source | Sequence[Source],
    weights: Sequence[float] | None,
    base_weights: Base | None,
) -> tuple[list[Adapter], list[float], list[Fold]]:
    """The adapters, their weights, and where they go."""
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    factors = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
    if not several or len(factors) != len(several) or not np.isfinite(factors).all():
        raise UsageError(f"{len(factors)} weights for {len(several)} adapters", cure="Give one number an adapter")
    folds: list[Fold] = []
    read = []
    for adapter, factor in zip(several, factors, strict=True):
        known, base = loaded(adapter, base_weights)
        _refuse(known)
        read.append(known)
        folds += [(place, factor) for place in resolve(model, known, base)]
    return read, factors, folds


def fold(
    folds: Sequence[Fold], building: Building, quantized: str | None = None,
    damage: dict[str, Mapping[str, float]] | None = None,
) -> list[ir.Value]:  # fmt: skip
    """Gives every layer that is named its own changed weight and bias; returns the new values, their numbers lazy.

    Args:
        folds: what changes, and by how much.
        building: the model that is being changed.
        quantized: what to do with packed weights, one of `CHOICES`.
        damage: gets what packing a weight again did to it, by target.
    """
    if quantized == "dequantize":
        floating = unpacked([place for place, _ in folds], building)
        folds = [(place, factor) for place, (_, factor) in zip(floating, folds, strict=True)]
    fresh: dict[tuple[Any, ...], ir.Value] = {}
    for spot in dict.fromkeys(spot for place, _ in folds for spot in place.spots):
        at = [(place, factor) for place, factor in folds if spot in place.spots]
        _fold_spot(spot, at, building, fresh, quantized, damage)
    settle(fresh.values())
    return list(fresh.values())


def unpacked(found: Sequence[Found], building: Building) -> list[Found]:
    """The same targets, their packed layers made ones of floating point."""
    made: dict[Any, ir.Value] = {}
    spots = {
        spot: as_float(spot, building, made) if is_packed(spot) else spot
        for spot in dict.fromkeys(spot for place in found for spot in place.spots)
    }
    return [replace(place, spots=tuple(spots[spot] for spot in place.spots)) for place in found]


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind in ("output", "context"):
            why = f"{update.method} changes {update.acts_on}, not its weights"
            raise NotMergeable(why, where=str(target), cure="Inject it instead")


def _fold_spot(
    spot: Spot, at: list[Fold], building: Building, fresh: dict[tuple[Any, ...], ir.Value], quantized: str | None,
    damage: dict[str, Mapping[str, float]] | None,
) -> None:  # fmt: skip
    layer = spot.kind(spot.node, Branch(building, "merge"))
    held: ir.Value = layer.operand
    name, packed = str(at[0][0].asked), is_packed(spot)
    updates = [update for place, _ in at for update in place.updates]
    if packed and quantized is None:
        raise Unsupported("a quantized weight", where=name, cure=EXPLAINED)
    bias = layer.own_bias if layer.after is None else layer.after[1]
    lost = [update for update in updates if update.changes_bias and update.needs_bias]
    if lost and bias is None:
        cure = "Inject it instead of merging"
        raise NotMergeable("changes a bias that the layer does not have", where=name, cure=cure)
    key = tuple((id(place), factor) for place, factor in at)
    if bias is not None and any(update.changes_bias for update in updates):
        kind = bias.dtype or ir.DataType.FLOAT
        numbers_of = partial(_bias, spot, at, spot.kind.detached(spot.node), held_apart(bias))
        change = Change(name, from_array(lambda: _rounded(numbers_of(), kind, name), shape_of(bias), kind), ())
        new = fresh_value(building, fresh, ("bias", id(bias), id(held), *key), bias, change)
        holder = spot.node if layer.after is None else layer.after[0]
        holder.replace_input_with(list(holder.inputs).index(bias), new)
    if issubclass(spot.kind, Recurrent):
        made, kind = spot.kind.changed(spot.node, partial(_added, at)), held.dtype or ir.DataType.FLOAT
        change = Change(name, from_array(lambda: _rounded(made(), kind, name), shape_of(held), kind), ())
        new = fresh_value(building, fresh, ("weight", id(held), spot.kind, *key), held, change)
        spot.node.replace_input_with(spot.kind.position, new)
    elif packed and any(update.changes_weight for update in updates):
        packing = packing_of(spot, building, fresh)
        folds = tuple(_stored(place, factor, spot, packing.stored, packing.shape) for place, factor in at)
        done = packing.again(Change(name, packing.source(spot), folds))
        if damage is not None:
            damage[name] = done
    elif any(update.changes_weight for update in updates):
        stored = stored_behind(held)
        folds = tuple(_stored(place, factor, spot, stored, shape_of(stored.value)) for place, factor in at)
        change = Change(name, lazy_of(stored.value), folds)
        new = fresh_value(building, fresh, ("weight", id(stored.value), *key), stored.value, change)
        exchange(spot.node, spot.kind.position, stored, new, building)


def _stored(place: Found, factor: float, spot: Spot, stored: Stored, shape: tuple[int, ...]) -> Folded:
    """A target's updates of a weight in the order in which its numbers are stored."""
    turned = (spot.kind.turns(spot.node) != place.turned) != stored.turned
    target = replace(place.target, layout="in out *k" if turned else "out *in")
    updates = tuple(update for update in place.updates if update.changes_weight)
    return Folded(target, updates, factor, 0, False, shape)


def _bias(spot: Spot, at: list[Fold], held: Callable[[], Array], bias: ir.Value) -> Array:
    """b' as the node takes it, in float64."""
    before = numbers(bias).astype(np.float64)
    flat, after = before.reshape(-1), before.reshape(-1).copy()
    needs = any(update.bias_sees_weight for place, _ in at for update in place.updates)
    W = _seen(held().astype(np.float64), spot) if needs else None
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        seen = None if W is None else _part(W, place)
        after[rows] += factor * (_through(place, seen, flat[rows])[1] - flat[rows])
    return after.reshape(before.shape)


def _added(at: list[Fold], W: Array) -> Array:
    """W' of a weight that is held whole, in float64."""
    after = W.copy()
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        after[rows] += factor * (_through(place, W[rows])[0] - W[rows])
    return after


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
