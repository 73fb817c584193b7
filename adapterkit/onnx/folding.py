"""Fold an adapter's updates into the weights of its target layers; all other layers keep their weights.

Layers may share a stored tensor, because the layers are tied or because the exporter stored equal tensors once. In that
case, the changed layer gets a separate copy, and the other layers keep the old tensor. Changes are computed in float64
and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.updates import Additive, Update
from ..errors import Malformed, NotMergeable, Unsupported
from ..merging.planned_update import PlannedUpdate as Folded
from .biases import settle_biases
from .building import Array, Branch, Building, kind_of
from .changes import Fresh, Stored, StoredChange, exchange, fresh_value, from_array, lazy_of, settle, stored_behind
from .experts import EXPERT, Experts, PackedExperts
from .experts import as_floats as experts_as_floats
from .experts import packing_of as packing_of_experts
from .integer_layers import opened_up
from .layers import BEFORE, GraphLayer, refuse_fused_bias
from .norms import groups_of
from .operands import detached_copy, numbers, shape_of
from .packed import EXPLAINED, MOST_LOST, as_float, is_packed, packing_of
from .recurrent import Recurrent
from .resolved import ResolvedTarget, Spot, through
from .selected import SelectedExperts, expert_of, part_of_expert, refuse_selected

if TYPE_CHECKING:
    pass

PlannedUpdate = tuple[ResolvedTarget, float]
"""A target of one adapter, and that adapter's weight in the merge."""


def fold(
    folds: Sequence[PlannedUpdate], building: Building, quantized: str | None = None,
    damage: dict[str, Mapping[str, float]] | None = None, keep_change: str | None = None,
    beside: list[ResolvedTarget] | None = None,
) -> list[ir.Value]:  # fmt: skip
    """Replace the weight and bias of every layer in `folds`; return the new initializers, which are computed lazily.

    Args:
        folds: pairs of a target and the merge weight of the target's adapter.
        building: the model that is being changed.
        quantized: one of `CHOICES`, which say how packed weights are merged. If None, a packed weight raises
            `Unsupported`, unless `keep_change` is `float`.
        damage: a dictionary from targets to quantization errors. If a changed weight is quantized again, the function
            adds the error of this quantization, even if the change is then attached beside the unchanged weight.
        keep_change: `float` attaches the change of a packed weight beside the unchanged weight; `packed` quantizes the
            changed weight again. By default, the change is attached if quantizing again would lose more than the
            fraction `MOST_LOST` of the change.
        beside: a list. The function appends each target whose change the caller must attach beside a packed weight. If
            `beside` is None, `keep_change` is ignored, and every change is folded into the weight.
    """
    opened = opened_up([place for place, _ in folds], building)
    folds = [(place, factor) for place, (_, factor) in zip(opened, folds, strict=True)]
    if quantized == "dequantize":
        floating = unpacked([place for place, _ in folds], building)
        folds = [(place, factor) for place, (_, factor) in zip(floating, folds, strict=True)]
    settle_biases([place for place, _ in folds], building)
    fresh: Fresh = {}
    # Fold all targets of a node together, so that the node's weight is rounded only once. For example, the queries,
    # keys and values of one packed layer are separate spots at the same node.
    by_node: dict[Any, tuple[Spot, list[PlannedUpdate]]] = {}
    for place, factor in folds:
        for spot in dict.fromkeys(place.spots):
            by_node.setdefault((spot.node, spot.kind), (spot, []))[1].append((place, factor))
    for spot, at in by_node.values():
        apart = Folding(spot, at, building, fresh).done(
            quantized, damage, None if beside is None else keep_change or ""
        )
        if beside is not None:
            beside += apart
    settle(fresh.values())
    return list(fresh.values())


def unpacked(places: Sequence[ResolvedTarget], building: Building) -> list[ResolvedTarget]:
    """Convert the packed layers of targets to floating point in the graph; return the targets with the new layers."""
    places = experts_as_floats(opened_up(places, building), building)
    fresh: Fresh = {}
    nodes: dict[Any, Spot] = {}
    spots: dict[Spot, Spot] = {}
    for spot in dict.fromkeys(spot for place in places for spot in place.spots):
        if not is_packed(spot):
            spots[spot] = spot
            continue
        key = spot.node, spot.kind
        if key not in nodes:
            nodes[key] = as_float(spot, building, fresh)
        spots[spot] = replace(nodes[key], names=spot.names, rows=spot.rows, shape=spot.shape)
    return [replace(place, spots=tuple(spots[spot] for spot in place.spots)) for place in places]


@dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """The updates to fold into one layer.

    Attributes:
        spot: the layer.
        at: the layer's targets, each paired with the merge weight of its adapter.
        building: the model that is being changed.
        fresh: the new tensors that this merge makes for all layers; see `Fresh`.
    """

    spot: Spot
    at: list[PlannedUpdate]
    building: Building
    fresh: Fresh

    @property
    def name(self) -> str:
        """The name of the layer's first target, for error messages."""
        return str(self.at[0][0].asked)

    @property
    def updates(self) -> list[Update]:
        return [update for place, _ in self.at for update in place.updates]

    @property
    def key(self) -> tuple[Hashable, ...]:
        return tuple((id(place), factor) for place, factor in self.at)

    def done(
        self, quantized: str | None, damage: dict[str, Mapping[str, float]] | None, keep: str | None
    ) -> list[ResolvedTarget]:  # fmt: skip
        """Change the layer's bias and weight; return the targets whose changes must be attached beside the layer.

        Args:
            quantized: one of `CHOICES`, as for `fold`.
            damage: a dictionary from targets to quantization errors. If the changed weight is quantized again, the
                function adds the error of this quantization.
            keep: one of `KEEPING`, an empty string, or None. Empty: attach the change only if quantizing the changed
                weight again would lose more than the fraction `MOST_LOST` of the change. None: never attach it.

        Raises:
            Unsupported: the layer does not support this change. This is also raised if the layer's weight is packed,
                `quantized` is None and `keep` is not `float`.
            NotMergeable: the updates need a bias that the layer does not have.
        """
        if any(key == EXPERT or key.startswith(BEFORE) for key in self.spot.node.metadata_props):
            why = "an injected adapter already changes the weight of this layer"
            raise Unsupported(why, where=self.name, cure="Remove that adapter first: adapterkit.onnx.eject")
        layer, packed = self.spot.kind(self.spot.node, Branch(self.building, "merge")), is_packed(self.spot)
        if packed and keep == "float":
            return self._apart(True)
        if packed and quantized is None:
            raise Unsupported("the weight is quantized", where=self.name, cure=EXPLAINED)
        normed = next((place.norm for place, _ in self.at if place.norm is not None), None)
        if packed and normed is not None:
            why = (
                f"the {normed.kind} {normed.name} is folded into this quantized weight, which cannot be quantized again"
            )
            raise Unsupported(why, where=self.name, cure="Merge with --quantized dequantize (quantized='dequantize')")
        if packed and any(update.changes_weight for update in self.updates):
            find = packing_of_experts if issubclass(self.spot.kind, PackedExperts) else packing_of
            packing = find(self.spot, self.building, self.fresh)
            change = StoredChange(self.name, packing.source(self.spot), self._folds(packing.stored, packing.shape))
            packed_numbers, loss = packing.tried(change)
            if damage is not None:
                damage[self.name] = loss
            if keep == "" and loss["kept"] < 1 - MOST_LOST and (apart := self._apart(False)):
                return apart
            self._bias(layer)
            packing.put(packed_numbers)
            return []
        self._bias(layer)
        if issubclass(self.spot.kind, Recurrent):
            self._recurrent(layer.operand, self.spot.kind)
        elif issubclass(self.spot.kind, Experts):
            self._experts(layer.operand, self.spot.kind)
        elif self.at[0][0].target.stacked:
            self._selected(layer.operand)
        elif normed is not None and any(update.changes_weight for update in self.updates):
            make = partial(_behind_norm, self.spot, self.at, self.spot.kind.detached(self.spot.node))
            new = self._replacement(layer.operand, make, "weight", id(layer.operand))
            self.spot.node.replace_input_with(self.spot.kind.position, new)
        elif self.spot.kind.whole and any(update.changes_weight for update in self.updates):
            make = partial(
                _matrix, self.spot, self.at, self.spot.kind.detached(self.spot.node), shape_of(layer.operand)
            )
            new = self._replacement(layer.operand, make, "weight", id(layer.operand))
            self.spot.node.replace_input_with(self.spot.kind.position, new)
        elif any(update.changes_weight for update in self.updates):
            self._weight(layer.operand)
        return []

    def _apart(self, must: bool) -> list[ResolvedTarget]:
        """Return the targets whose updates are attached beside the layer instead of being folded into its weight.

        Each returned update is already multiplied by the merge weight of its adapter.

        The list is empty if attached updates cannot compute the merged change.

        Raises:
            Unsupported: `must` is set, and attached updates cannot compute the merged change.
        """
        if self.spot.kind.inside:
            if must:
                why = f"the change cannot be added to the output of the node {self.spot.node.name}"
                cure = (
                    "Merge with --quantized requantize --keep-change packed "
                    "(quantized='requantize', keep_change='packed')"
                )
                raise Unsupported(why, where=self.name, cure=cure)
            return []
        if len(self.at) == 1 and self.at[0][1] == 1 and must:
            return [replace(self.at[0][0], spots=(self.spot,))]
        apart = []
        for place, factor in self.at:
            scaled = [u.scaled(factor) if isinstance(u, Additive) and factor != 1 else u for u in place.updates]
            if all(isinstance(update, Additive) for update in scaled):
                apart.append(replace(place, spots=(self.spot,), updates=tuple(scaled)))
        if len(apart) == len(self.at):
            return apart
        if must:
            methods = ", ".join(dict.fromkeys(update.method for update in self.updates))
            why = f"{methods} can be stored beside a quantized weight only if a single adapter is merged, with weight 1"
            cure = "Omit --keep-change (keep_change=), or combine the adapters first: adapterkit combine"
            raise Unsupported(why, where=self.name, cure=cure)
        return []

    def _bias(self, layer: GraphLayer) -> None:
        changing = self.updates
        if not any(update.changes_bias for update in changing):
            return
        bias = layer.stored_bias
        constant_bias = any(place.norm is not None and place.norm.bias is None for place, _ in self.at)
        if bias is None and layer.bias is not None:
            why = f"the update changes the bias of a node that computes with integers ({self.spot.node.op_type})"
            cure = "Merge with --quantized dequantize (quantized='dequantize')"
            raise Unsupported(why, where=self.name, cure=cure)
        if bias is None:
            refuse_fused_bias(layer, self.name)
        if (bias is None or constant_bias) and any(update.needs_bias for update in changing if update.changes_bias):
            why = "the update changes a bias that the layer does not have"
            raise NotMergeable(why, where=self.name, cure="Inject the adapter instead of merging it")
        if bias is None:
            return
        kind, node = self.spot.kind, self.spot.node
        change = partial(_bias, self.spot, self.at, kind.detached(node))
        if issubclass(kind, Recurrent | Experts):
            new = self._replacement(bias, kind.changed_bias(node, bias, change), "bias", id(bias), kind.__name__)
        else:
            copy = detached_copy(bias)
            new = self._replacement(bias, lambda: change(numbers(copy)), "bias", id(bias), id(layer.operand))
        holder = self.spot.node if layer.after is None else layer.after[0]
        holder.replace_input_with(list(holder.inputs).index(bias), new)

    def _recurrent(self, value: ir.Value, kind: type[Recurrent]) -> None:
        make = kind.changed(self.spot.node, partial(_added, self.at))
        self.spot.node.replace_input_with(
            kind.position, self._replacement(value, make, "weight", id(value), kind.__name__)
        )

    def _experts(self, value: ir.Value, kind: type[Experts]) -> None:
        number, name = kind_of(value), self.name
        make = kind.changed(self.spot.node, lambda W, start: _rounded(_added(self.at, W, start), number, name))
        self.spot.node.replace_input_with(
            kind.position, self._replacement(value, make, "weight", id(value), kind.__name__)
        )

    def _selected(self, value: ir.Value) -> None:
        kind = self.spot.kind
        assert issubclass(kind, SelectedExperts)
        for place, _ in self.at:
            refuse_selected(place)

        def changed(W: Array, number: int) -> Array:
            new = W.copy()
            for place, factor in self.at:
                before = part_of_expert(W, place)
                after, _ = through(expert_of(place, number), before)
                part_of_expert(new, place)[...] += factor * (np.asarray(after) - before)
            return _rounded(new, kind_of(value), self.name)

        make = kind.changed(self.spot.node, changed)
        new = self._replacement(value, make, "weight", id(value), "stack")
        self.spot.node.replace_input_with(kind.position, new)

    def _replacement(self, old: ir.Value, make: Callable[[], Array], *key: Hashable) -> ir.Value:
        """Return a new initializer that replaces `old` and has its dtype; `make` computes its values later."""
        kind, name = kind_of(old), self.name
        change = StoredChange(name, from_array(lambda: _rounded(make(), kind, name), shape_of(old), kind), ())
        return fresh_value(self.building, self.fresh, (*key, *self.key), old, change)

    def _weight(self, value: ir.Value) -> None:
        stored = stored_behind(value)
        change = StoredChange(self.name, lazy_of(stored.value), self._folds(stored, shape_of(stored.value)))
        # Nodes that share a stored tensor and have the same changes also share the changed tensor.
        key = ("weight", id(stored.value), *self.key)
        new = fresh_value(self.building, self.fresh, key, stored.value, change)
        exchange(self.spot.node, self.spot.kind.position, stored, new, self.building)

    def _folds(self, stored: Stored, shape: tuple[int, ...]) -> tuple[Folded, ...]:
        return tuple(_stored(place, factor, self.spot, stored, shape) for place, factor in self.at)


def _stored(place: ResolvedTarget, factor: float, spot: Spot, stored: Stored, shape: tuple[int, ...]) -> Folded:
    """Return a `Folded` with the updates that change the weight. `Folded.target` has the stored tensor's axis order."""
    turned = (spot.kind.turns(spot.node) != place.turned) != stored.turned
    target = replace(place.target, layout="in out *k" if turned else "out *in")
    updates = tuple(update for update in place.updates if update.changes_weight)
    return Folded(target, updates, factor, 0, False, shape)


def _bias(spot: Spot, at: list[PlannedUpdate], weight_of: Callable[[], Array], bias: Array) -> Array:
    """Return the changed bias in float64, in the shape of `bias`."""
    before = bias.astype(np.float64)
    flat, after = before.reshape(-1), before.reshape(-1).copy()
    needs = any(update.bias_sees_weight for place, _ in at for update in place.updates)
    W = seen_by(weight_of().astype(np.float64), spot) if needs else None
    for place, factor in at:
        rows = slice(*place.target.rows) if place.target.rows else slice(None)
        norm = place.norm
        if norm is None:
            bias_flat, scale = flat, np.ones(1)
        else:
            bias_flat = np.zeros_like(flat) if norm.bias is None else norm.bias
            scale = norm.scale[rows]
        seen = None if W is None else part_of(W if norm is None else norm.weight, place)
        # If a norm is folded into the layer, the graph's bias is `scale * b + shift`, where `b` is the base's bias. So
        # a change of `b` must be multiplied by the scale.
        after[rows] += factor * scale * (through(place, seen, bias_flat[rows])[1] - bias_flat[rows])
    return after.reshape(before.shape)


def _behind_norm(spot: Spot, at: list[PlannedUpdate], weight_of: Callable[[], Array]) -> Array:
    """Return the changed weight of a layer into which a norm is folded. It is float64, in the node's axis order.

    The updates apply to the base's weight. The graph's weight is the base's weight multiplied by the norm's scale, so
    the change is multiplied by this scale, too.
    """
    V = seen_by(weight_of().astype(np.float64), spot).copy()
    for place, factor in at:
        assert place.norm is not None
        D = np.zeros_like(V)
        W = part_of(place.norm.weight, place)
        part_of(D, place)[...] = through(place, W)[0] - W
        V += factor * place.norm.factors(groups_of(spot)) * D
    return seen_by(V, spot)


def _matrix(spot: Spot, at: list[PlannedUpdate], weight_of: Callable[[], Array], shape: tuple[int, ...]) -> Array:
    """Return a layer's changed weight in float64, in the shape of the stored weight."""
    before = seen_by(weight_of().astype(np.float64), spot)
    after = before.copy()
    for place, factor in at:
        W = part_of(before, place)
        part_of(after, place)[...] += factor * (through(place, W)[0] - W)
    return seen_by(after, spot).reshape(shape)


def _added(at: list[PlannedUpdate], W: Array, start: int = 0) -> Array:
    """Return a copy of `W`, changed by every update whose target rows all lie in `W`.

    The first row of `W` is row `start` of the layer. A target without `rows` covers all rows of `W`.
    """
    after = W.copy()
    for place, factor in at:
        first, last = place.target.rows or (start, start + len(W))
        if start <= first and last <= start + len(W):
            rows = slice(first - start, last - start)
            part = W[rows].T if place.turned else W[rows]
            change = factor * (through(place, part)[0] - part)
            after[rows] += change.T if place.turned else change
    return after


def seen_by(W: Array, spot: Spot) -> Array:
    """Convert a weight from a node's axis order to the order that the adapter formulas use, or back."""
    return W.swapaxes(0, 1) if spot.kind.turns(spot.node) else W


def part_of(W: Array, place: ResolvedTarget) -> Array:
    """Return the rows of `W` that the target's updates change, in the axis order that the updates use."""
    W = W.swapaxes(0, 1) if place.turned else W
    return W[slice(*place.target.rows)] if place.target.rows else W


def _rounded(array: Array, kind: ir.DataType, name: str) -> Array:
    if array.dtype == kind.numpy():
        return array
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array).astype(kind.numpy())
    # Refuse NaNs and infinities only if the conversion made them: the base itself may already contain some.
    if not np.isfinite(out.astype(np.float64)).all() and np.isfinite(array).all():
        cure = "Give the adapter a smaller merge weight: --weight (weights=)"
        raise Malformed(f"merging gives values that are too large for {kind.name}", where=name, cure=cure)
    return out
