"""Merge adapters into the weights of the layers that they name, and of no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter
from ..core.updates import Update
from ..errors import Malformed, NotMergeable, Unsupported, UsageError, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_array
from ..io.locations import path_text
from ..merging.planned_update import PlannedUpdate as Folded
from ..naming.binding import renamed
from .building import Array, Branch, Building, kind_of
from .changes import Change, Stored, exchange, fresh_value, from_array, lazy_of, settle, stored_behind
from .checking import Outcome, checked_merge
from .found import Found, Spot
from .injecting import Report
from .layers import Layer, Recurrent
from .model_file import Source as Opened
from .model_file import opened, placing, save_merged
from .norms import groups_of
from .operands import held_apart, numbers, shape_of
from .packed import CHOICES, EXPLAINED, as_float, is_packed, packing_of
from .reading import base_warnings, inputs_of, loaded, name_of
from .resolving import resolve
from .saturation import clipping
from .tying import Tying

PlannedUpdate = tuple[Found, float]
"""A target of one adapter, and that adapter's weight in the merge."""


@dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """The updates to fold into one layer.

    Attributes:
        spot: the layer.
        at: its targets and their factors.
        building: the model that is being changed.
        fresh: new tensors of the whole merge, by what they are made from.
    """

    spot: Spot
    at: list[PlannedUpdate]
    building: Building
    fresh: dict[tuple[Any, ...], ir.Value]

    @property
    def name(self) -> str:
        """The target, for errors."""
        return str(self.at[0][0].asked)

    @property
    def updates(self) -> list[Update]:
        return [update for place, _ in self.at for update in place.updates]

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple((id(place), factor) for place, factor in self.at)

    def done(self, quantized: str | None, damage: dict[str, Mapping[str, float]] | None) -> None:
        """Replace the layer's bias and weight by the changed ones."""
        layer, packed = self.spot.kind(self.spot.node, Branch(self.building, "merge")), is_packed(self.spot)
        if packed and quantized is None:
            raise Unsupported("a quantized weight", where=self.name, cure=EXPLAINED)
        normed = next((place.norm for place, _ in self.at if place.norm is not None), None)
        if packed and normed is not None:
            why = f"a quantized weight that the batch normalisation {normed.name} is folded into, quantized again"
            raise Unsupported(why, where=self.name, cure="Merge with --quantized dequantize, quantized='dequantize'")
        self._bias(layer)
        if issubclass(self.spot.kind, Recurrent):
            self._recurrent(layer.operand, self.spot.kind)
        elif packed and any(update.changes_weight for update in self.updates):
            done = self._packed()
            if damage is not None:
                damage[self.name] = done
        elif normed is not None and any(update.changes_weight for update in self.updates):
            make = partial(_behind_norm, self.spot, self.at, self.spot.kind.detached(self.spot.node))
            new = self._made(layer.operand, make, "weight", id(layer.operand))
            self.spot.node.replace_input_with(self.spot.kind.position, new)
        elif any(update.changes_weight for update in self.updates):
            self._weight(layer.operand)

    def _bias(self, layer: Layer) -> None:
        bias, changing = layer.own_bias if layer.after is None else layer.after[1], self.updates
        own = any(place.norm is not None and place.norm.bias is None for place, _ in self.at)
        if (bias is None or own) and any(update.changes_bias and update.needs_bias for update in changing):
            cure = "Inject it instead of merging"
            raise NotMergeable("changes a bias that the layer does not have", where=self.name, cure=cure)
        if bias is None or not any(update.changes_bias for update in changing):
            return
        make = partial(_bias, self.spot, self.at, self.spot.kind.detached(self.spot.node), held_apart(bias))
        new = self._made(bias, make, "bias", id(bias), id(layer.operand))
        holder = self.spot.node if layer.after is None else layer.after[0]
        holder.replace_input_with(list(holder.inputs).index(bias), new)

    def _recurrent(self, held: ir.Value, kind: type[Recurrent]) -> None:
        make = kind.changed(self.spot.node, partial(_added, self.at))
        self.spot.node.replace_input_with(kind.position, self._made(held, make, "weight", id(held), kind))

    def _made(self, old: ir.Value, make: Callable[[], Array], *key: Any) -> ir.Value:
        """Return a tensor that is computed as a whole, in place of an old one and in its dtype."""
        kind, name = kind_of(old), self.name
        change = Change(name, from_array(lambda: _rounded(make(), kind, name), shape_of(old), kind), ())
        return fresh_value(self.building, self.fresh, (*key, *self.key), old, change)

    def _packed(self) -> dict[str, float]:
        packing = packing_of(self.spot, self.building, self.fresh)
        return packing.again(Change(self.name, packing.source(self.spot), self._folds(packing.stored, packing.shape)))

    def _weight(self, held: ir.Value) -> None:
        stored = stored_behind(held)
        change = Change(self.name, lazy_of(stored.value), self._folds(stored, shape_of(stored.value)))
        # Nodes with the same tensor and the same changes share the result.
        key = ("weight", id(stored.value), *self.key)
        new = fresh_value(self.building, self.fresh, key, stored.value, change)
        exchange(self.spot.node, self.spot.kind.position, stored, new, self.building)

    def _folds(self, stored: Stored, shape: tuple[int, ...]) -> tuple[Folded, ...]:
        return tuple(_stored(place, factor, self.spot, stored, shape) for place, factor in self.at)


def _stored(place: Found, factor: float, spot: Spot, stored: Stored, shape: tuple[int, ...]) -> Folded:
    """Return a target's weight updates, with the layout in which the tensor is stored."""
    turned = (spot.kind.turns(spot.node) != place.turned) != stored.turned
    target = replace(place.target, layout="in out *k" if turned else "out *in")
    updates = tuple(update for update in place.updates if update.changes_weight)
    return Folded(target, updates, factor, 0, False, shape)


def _bias(spot: Spot, at: list[PlannedUpdate], held: Callable[[], Array], bias: ir.Value) -> Array:
    """Return the changed bias as the node takes it, in float64."""
    before = numbers(bias).astype(np.float64)
    flat, after = before.reshape(-1), before.reshape(-1).copy()
    needs = any(update.bias_sees_weight for place, _ in at for update in place.updates)
    W = _seen(held().astype(np.float64), spot) if needs else None
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        norm = place.norm
        own, scale = (flat, np.ones(1)) if norm is None else (_or_zeros(norm.bias, flat), norm.scale[rows])
        seen = None if W is None else _part(W if norm is None else norm.weight, place)
        # With a folded norm the graph holds scale * b + shift, so a change of b counts times the scale.
        after[rows] += factor * scale * (_through(place, seen, own[rows])[1] - own[rows])
    return after.reshape(before.shape)


def _or_zeros(array: Array | None, like: Array) -> Array:
    return np.zeros_like(like) if array is None else array


def _behind_norm(spot: Spot, at: list[PlannedUpdate], held: Callable[[], Array]) -> Array:
    """Return the changed weight of a layer with a folded norm, as the node takes it, in float64.

    The updates apply to the base's weight. Their change is then multiplied by the norm's scale, as the graph's is.
    """
    V = _seen(held().astype(np.float64), spot).copy()
    for place, factor in at:
        assert place.norm is not None
        D = np.zeros_like(V)
        W = _part(place.norm.weight, place)
        _part(D, place)[...] = _through(place, W)[0] - W
        V += factor * place.norm.factors(groups_of(spot)) * D
    return _seen(V, spot)


def _added(at: list[PlannedUpdate], W: Array) -> Array:
    """Return the changed weight, computed as a whole, in float64."""
    after = W.copy()
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        after[rows] += factor * (_through(place, W[rows])[0] - W[rows])
    return after


def _through(place: Found, W: Any, b: Any = None) -> tuple[Any, Any]:
    """Apply a target's updates to W and b, in order."""
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
    # Only an overflow is an error here. A base may hold NaN or infinity already.
    if not np.isfinite(out.astype(np.float64)).all() and np.isfinite(array).all():
        cure = "Merge with a smaller weight"
        raise Malformed(f"merging gives values that {kind.name} cannot hold", where=name, cure=cure)
    return out


# Merge adapters into the weights of the layers that they name, and of no others.
#
# A stored tensor may be shared with other layers, because it is tied or because the exporter stored equal tensors
# once. Then it stays as it is for those, and the layer gets its own copy. Everything is computed in float64 and
# rounded once.


if TYPE_CHECKING:
    from .reading import Base, Model

    Source = Adapter | str | PathLike[str]


@places_errors
def merge(
    model: Model,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    quantized: str | None = None,
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    check: bool | Mapping[str, Any] = True,
    overwrite: bool = True,
    made_from: str | None = None,
) -> Report:
    """Fold adapters into the weights of a graph: W' = W + sum_i weight_i * (f_i(W) - W), with one rounding.

    Args:
        model: an ONNX file, an in-memory model, or a folder of graphs that make up one model, such as encoder and
            decoders. Nothing of it is changed.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. If the model has external data, the result gets one new data file beside it. For a
            folder, the folder to write: each graph takes the targets that it has, and all other files are copied.
        weights: one factor per adapter; 1 for each if not given.
        base_weights: the weights that the graph was exported from, to find layers whose names are lost.
        quantized: for packed weights. `dequantize` folds into the dequantized numbers and writes a floating-point
            layer. `requantize` quantizes the result again in the same scheme; `Report.damage` has the error.
        tied: which layers an update changes if embedding and head have equal numbers, as in `adapterkit.merge`. By
            default, those that the tool which trained the adapter changed.
        strict_base: refuse a base whose name, config or fingerprint differs from the one that an adapter names, instead
            of a warning in the report.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        allow_partial: leave out targets that the graph lacks; at least one of each adapter must be there.
        check: run the result in onnxruntime and compare it with injected adapters; a mapping gives the inputs by name,
            True makes them up.
        overwrite: replace an existing `out`.
        made_from: a digest of everything that decides the output, stored with it for a later run.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        NotMergeable: an update does not change weights only.
        Unsupported: a weight is packed and `quantized` is not given, or its packing scheme is unknown.
        Malformed: the file is not a model, or a result does not fit its dtype.
        UsageError: nothing tells which of several tied layers an update changes.
        CheckFailed: the written graph computes something else, or `strict_base` is set and the base differs; nothing is
            left at `out`.
    """
    if quantized is not None and quantized not in CHOICES:
        raise UsageError(f"unknown choice {quantized!r}", where="quantized", cure=f"Known: {', '.join(CHOICES)}")
    from .folders import folder_of, merge_folder, only_graph

    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    if (folder := folder_of(model, out)) is not None:
        return merge_folder(
            folder, several, out, weights=weights, base_weights=base_weights, quantized=quantized, tied=tied,
            strict_base=strict_base, rename=rename, allow_partial=allow_partial, check=check, overwrite=overwrite,
            made_from=made_from,
        )  # fmt: skip
    source = opened(only_graph(model))
    tying = _tying(source, base_weights, tied)
    read, factors, folds, wrong = _resolved(
        source.model, several, weights, base_weights, tying, strict_base, rename, allow_partial
    )
    building, damage = Building(source.model), dict[str, Mapping[str, float]]()
    changed = fold(folds, building, quantized, damage)
    building.settle()
    target, told = Path(path_text(out)), Outcome(None)
    inputs = [file for one in several for file in inputs_of(one, base_weights)]
    with placing(target, source, inputs=inputs, overwrite=overwrite, made_from=made_from) as place:
        save_merged(source.model, source, place.path, changed)
        if check is not False:
            given = None if isinstance(check, bool) else check
            told = checked_merge(model, read, factors, base_weights, place.path, quantized, given, tying)
        warnings = (*wrong, *dict.fromkeys(tying.warnings), *clipping(told.saturation, source.model))
    found = tuple(found for found, _ in folds)
    return Report(
        target, place.files, found, told.difference, told.note, damage, told.reference, saturation=told.saturation,
        warnings=warnings,
    )  # fmt: skip


@places_errors
def plan(
    model: Model,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
) -> tuple[Found, ...]:
    """Return where `merge` would fold adapters into a graph, or into the graphs of a folder; writes nothing.

    Raises:
        TargetNotFound, ShapeMismatch, NotMergeable, Malformed, UsageError, CheckFailed: as `merge`.
    """
    from .folders import folder_of, graphs_in, only_graph, plan_folder

    if (folder := folder_of(model, "")) is not None and len(graphs_in(folder)) > 1:
        return plan_folder(
            folder, adapters, weights=weights, rename=rename, allow_partial=allow_partial, base_weights=base_weights,
            tied=tied, strict_base=strict_base,
        )  # fmt: skip
    source = opened(only_graph(model))
    tying = _tying(source, base_weights, tied)
    folds = _resolved(source.model, adapters, weights, base_weights, tying, strict_base, rename, allow_partial)[2]
    return tuple(place for place, _ in folds)


def _tying(source: Opened, base_weights: Base | None, tied: str | Mapping[str, str] | None) -> Tying:
    return Tying.of(None if base_weights is None else opened_base(base_weights), source.path, tied)


def _resolved(
    model: ir.Model,
    adapters: Source | Sequence[Source],
    weights: Sequence[float] | None,
    base_weights: Base | None,
    tying: Tying,
    strict_base: bool,
    rename: str | Sequence[str],
    allow_partial: bool,
) -> tuple[list[Adapter], list[float], list[PlannedUpdate], tuple[str, ...]]:
    """Return the adapters, their factors, the targets to fold into, and warnings about the base."""
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    factors = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
    if not several or len(factors) != len(several) or not np.isfinite(factors).all():
        raise UsageError(f"{len(factors)} weights for {len(several)} adapters", cure="Give one number an adapter")
    folds: list[PlannedUpdate] = []
    read: list[Adapter] = []
    named, base = [], None
    for adapter in several:
        known, base = loaded(adapter, base_weights)
        _refuse(known)
        read.append(known)
        named.append((name_of(adapter), known))
    read = renamed(read, rename)
    warnings = base_warnings(named, base, strict_base)
    if allow_partial:
        from .folders import left_out

        split = [left_out(model, known, base, tying) for known in read]
        read, warnings = [kept for kept, _ in split], (*warnings, *(line for _, lines in split for line in lines))
    for known, factor in zip(read, factors, strict=True):
        folds += [(place, factor) for place in resolve(model, known, base, tying)]
    return read, factors, folds, warnings


def fold(
    folds: Sequence[PlannedUpdate], building: Building, quantized: str | None = None,
    damage: dict[str, Mapping[str, float]] | None = None,
) -> list[ir.Value]:  # fmt: skip
    """Give every named layer its own changed weight and bias; return the new values, whose numbers are lazy.

    Args:
        folds: targets and factors.
        building: the model that is being changed.
        quantized: what to do with packed weights, one of `CHOICES`.
        damage: gets the error of each requantized weight, by target.
    """
    if quantized == "dequantize":
        floating = unpacked([place for place, _ in folds], building)
        folds = [(place, factor) for place, (_, factor) in zip(floating, folds, strict=True)]
    fresh: dict[tuple[Any, ...], ir.Value] = {}
    # All targets of a node are folded together, because its weight is rounded only once.
    # Queries, keys and values of one packed layer are spots of one node.
    by_node: dict[Any, tuple[Spot, list[PlannedUpdate]]] = {}
    for place, factor in folds:
        for spot in dict.fromkeys(place.spots):
            by_node.setdefault((spot.node, spot.kind), (spot, []))[1].append((place, factor))
    for spot, at in by_node.values():
        Folding(spot, at, building, fresh).done(quantized, damage)
    settle(fresh.values())
    return list(fresh.values())


def unpacked(found: Sequence[Found], building: Building) -> list[Found]:
    """Return the same targets with their packed layers converted to floating point."""
    made: dict[Any, ir.Value] = {}
    nodes: dict[Any, Spot] = {}
    spots: dict[Spot, Spot] = {}
    for spot in dict.fromkeys(spot for place in found for spot in place.spots):
        if not is_packed(spot):
            spots[spot] = spot
            continue
        key = spot.node, spot.kind
        if key not in nodes:
            nodes[key] = as_float(spot, building, made)
        spots[spot] = replace(nodes[key], names=spot.names, rows=spot.rows, shape=spot.shape)
    return [replace(place, spots=tuple(spots[spot] for spot in place.spots)) for place in found]


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind in ("output", "context"):
            why = f"{update.method} changes {update.acts_on}, not its weights"
            raise NotMergeable(why, where=str(target), cure="Inject it instead")
