"""Attach an adapter to a graph: at each target, add nodes that compute the output with the adapter's formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from ..core.updates import Additive, Composed, OutputUpdate, Update, WeightUpdate
from ..errors import AdapterkitError, Unsupported
from ..io.lazy import as_array
from ..methods.dense import Dense
from ..methods.replacement import Replacement
from .biases import settle_biases
from .building import Array, Branch, Building, Dtype, before, behind
from .calls import CallWords, Heard
from .expert_nodes import with_split
from .experts import Experts, PackedExperts
from .fused_nodes import Attention, taken_apart
from .inside import changed_inside, experts_changed, refuse_outputs
from .integer_layers import MatMulIntegerToFloat, QAttention, opened_up
from .layers import GraphLayer, MatMul, refuse_fused_bias
from .norms import computes_apart
from .outlets import Ended
from .resolved import FoldedNorm, ResolvedTarget, Spot
from .rowwise import RowSlots
from .selected import SelectedExperts, attach_selected
from .values import Unsayable, Value, computed_over

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.adapter import Target
    from ..core.updates.update import Layer as FormulaLayer
    from ..io.lazy import Leaf
    from .slots import Slots


class Slice:
    """A view of a range of a layer's output channels, for updates that change only some rows of a fused weight."""

    def __init__(self, layer: GraphLayer | Normed | Ended, rows: tuple[int, int]) -> None:
        self.layer, self.rows = layer, slice(*rows)
        self.x, self.branch = layer.x, layer.branch
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct, self.node = layer.op, layer.direct, layer.node

    def __call__(self, x: Value) -> Value:
        return self.cut(self.layer(x), self.rows)

    def cut(self, y: Value, rows: slice) -> Value:
        """Return only the channels `rows` of the output `y`."""
        return y[(..., rows, *[slice(None)] * (-self.channel - 1))]

    @property
    def weight(self) -> Value:
        return known_weight(self.layer)[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def bias(self) -> Value | None:
        b = self.layer.bias
        return None if b is None else b[self.rows]

    def around(self, y: Value, part: Value) -> Value:
        """Return the output `y` of the whole layer with this slice's channels replaced by `part`."""
        from .values import concatenated

        out = self.layer.shape[0]
        pieces = [part]
        if self.rows.start:
            pieces.insert(0, self.cut(y, slice(0, self.rows.start)))
        if self.rows.stop < out:
            pieces.append(self.cut(y, slice(self.rows.stop, out)))
        return concatenated(pieces, self.channel)


class Normed:
    """A layer with a folded batch normalisation or scale. Formulas see the layer as it was before the folding."""

    def __init__(self, layer: GraphLayer, norm: FoldedNorm) -> None:
        self.layer, self.folded = layer, norm
        self.x, self.branch, self.node, self.dtype, self.shape = (
            layer.x,
            layer.branch,
            layer.node,
            layer.dtype,
            layer.shape,
        )
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct = layer.op, layer.direct

    def __call__(self, x: Value) -> Value:
        if x is self.x:
            scale = self.folded.scale
            # If a channel's scale is 0, the norm has set the channel to a constant. Divide such a channel by 1 instead
            # of 0; the quotient does not matter, because `around` multiplies it by 0.
            back = 1 / np.where(abs(scale) < 1e-30, 1.0, scale)
            return (self.layer(x) - self._vector(self.folded.shift)) * self._vector(back)
        y = self.op(x, self.weight)
        return y if self.bias is None else y + self.per_channel(self.bias)

    def hidden(self, x: Value) -> Value:
        return self(x)

    @property
    def weight(self) -> Value:
        return self._known(self.folded.weight)

    @property
    def bias(self) -> Value | None:
        return None if self.folded.bias is None else self._known(self.folded.bias)

    def around(self, new: Value) -> Value:
        """Apply the norm to the output `new`. If `new` equals `self(self.x)`, the result is exactly `layer.y`."""
        return self.layer.y + (new - self(self.x)) * self._vector(self.folded.scale)

    def _vector(self, array: Array) -> Value:
        return self.per_channel(self._known(array))

    def _known(self, array: Array) -> Value:
        return Value(self.branch, array.shape, self.dtype, None, lambda: array)


class Turned:
    """A view of a layer that swaps the first two axes of the layer's weight, as for embeddings."""

    def __init__(self, layer: GraphLayer | Normed | Ended) -> None:
        self.layer, self.x, self.branch, self.node = layer, layer.x, layer.branch, layer.node
        self.channel, self.direct, self.per_channel, self.bias = layer.channel, False, layer.per_channel, layer.bias

    def __call__(self, x: Value) -> Value:
        return self.layer(x)

    @property
    def weight(self) -> Value:
        return known_weight(self.layer).swapaxes(0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def op(self, x: Value, w: Value) -> Value:
        return self.layer.op(x, w.swapaxes(0, 1))

    def mix(self, h: Value, w: Value) -> Value:
        raise Unsayable("the update mixes channels, but the layer's weight is transposed")


TargetView = GraphLayer | Ended | Normed | Slice | Turned
"""The types of object that a formula may get as the target's layer."""


def known_weight(layer: TargetView) -> Value:
    """Return a target's weight.

    Raises:
        Unsayable: the target is a module without a weight.
    """
    weight = layer.weight
    if weight is None:
        raise Unsayable("the target is a module without a weight")
    return weight


def attach(
    places_found: Sequence[ResolvedTarget],
    building: Building,
    slots: Slots | RowSlots | None = None,
    words: CallWords | None = None,
) -> None:
    """Insert the nodes that apply the updates of every target.

    If several targets are at one node, each target is a range of rows of the node's weight.

    Args:
        places_found: the targets.
        building: collects the changes to the model.
        slots: creates graph inputs for the adapter's tensors, so that other adapters can be loaded later (see
            slots.py); None to store the tensors in the graph as constants.
        words: finds the inputs of the model's call in the graph, for the updates that read these inputs. None to find
            them by their default names.

    Raises:
        Unsupported: a layer does not support the method of an update.
    """
    words = words or CallWords(building, [update for place in places_found for update in place.updates])
    apart: dict[ir.Node, ir.Node] = {}
    places_found = opened_up(places_found, building)
    settle_biases(places_found, building)
    for place in places_found:
        if place.spots and issubclass(kind := place.spots[0].kind, Experts):
            _check_experts(place, kind, isinstance(slots, RowSlots))
    if slots is not None:
        places_found = with_split(places_found, building)
    stacks: dict[tuple[ir.Node, type[Experts]], list[ResolvedTarget]] = {}
    for place in in_order(places_found, building.model.graph):
        if place.spots and issubclass(place.spots[0].kind, Experts):
            for spot in place.spots:
                assert issubclass(spot.kind, Experts)
                stacks.setdefault((spot.node, spot.kind), []).append(place)
            continue
        if place.spots and issubclass(place.spots[0].kind, SelectedExperts):
            _attach_selected(place, building, slots)
            continue
        for spot in place.spots:
            _attach(place, _apart(spot, building, apart), building, slots, words)
        if not place.spots:
            _attach(place, None, building, slots, words)
    for (node, kind), places in stacks.items():
        assert not isinstance(slots, RowSlots)  # `_check_experts` raises an error for experts with `RowSlots`.
        _attach_experts(node, kind, places, building, slots)
    words.shadows.close()


def unchangeable(places: Sequence[ResolvedTarget], by_rows: bool) -> list[Target]:
    """Return the targets that cannot be changed by adding nodes, because a single node computes all experts.

    With `by_rows`, return all targets inside such nodes; otherwise, only those with packed weights.
    """
    kind = Experts if by_rows else PackedExperts
    return [*dict.fromkeys(at.asked for at in places if at.spots and issubclass(at.spots[0].kind, kind))]


def _check_experts(place: ResolvedTarget, kind: type[Experts], by_rows: bool) -> None:
    """Raise an error if the experts inside a node cannot be changed by adding nodes.

    Raises:
        Unsupported: the node reads packed weights. Or an update changes an output. Or `by_rows` is set: each row of a
            batch may then use a different adapter, but the node reads the same weights for all rows.
    """
    node = place.spots[0].node
    where = f"its experts are inside the node {node.name or node.outputs[0].name} ({node.op_type})"
    if issubclass(kind, PackedExperts):
        why = f"{where}, which reads packed weights, so added nodes cannot change the experts"
        cure = f"Merge the adapter instead: adapterkit merge {_PACKED}; or omit such targets: {_PARTIAL}"
        raise Unsupported(why, where=str(place.asked), cure=cure)
    if by_rows:
        why = f"{where}, which reads the same weights for all rows of a batch, but each row may use a different adapter"
        cure = f"Inject the adapter with --mode slots (mode='slots'); or omit such targets: {_PARTIAL}"
        raise Unsupported(why, where=str(place.asked), cure=cure)
    refuse_outputs(place, node.op_type)


def _attach_selected(place: ResolvedTarget, building: Building, slots: Slots | RowSlots | None) -> None:
    if isinstance(slots, RowSlots):
        why = "its experts are selected for each token, so the rows of a batch cannot use different adapters"
        raise Unsupported(why, where=str(place.asked), cure="Inject the adapter with --mode slots (mode='slots')")
    attach_selected(place, building, None if slots is None else slots.stacked)


def _attach_experts(
    node: ir.Node, kind: type[Experts], places: Sequence[ResolvedTarget], building: Building, slots: Slots | None
) -> None:
    """Insert nodes that compute the changed stack of expert weights, and let the experts' node read this stack."""
    # Two targets may have overlapping rows, for example the targets of two adapters. Their updates must be applied one
    # after the other, so put such targets into different rounds. Each round computes all of its changes at once.
    rounds: list[list[ResolvedTarget]] = []
    for place in places:
        free = (one for one in rounds if not any(_overlap(place, other) for other in one))
        if (current := next(free, None)) is None:
            rounds.append(current := [])
        current.append(place)
    for number, together in enumerate(rounds):
        branch = Branch(building, f"adapterkit/{kind.operand_of(node).name}{f'_{number}' if number else ''}")
        layer, parts = kind(node, branch), []
        for place in together:
            assert place.target.rows is not None
            seen = Slice(layer, place.target.rows)
            _check(place, layer, layer.bias)
            given = [_valued(update, layer, place, at, slots) for at, update in enumerate(place.updates)]
            try:
                new = _new_weights(given, seen, layer, place, slots)
            except (AttributeError, TypeError) as error:  # The formula uses an operation that graph values lack.
                why = f"the formula cannot be written as nodes: {error}"
                raise Unsupported(why, where=str(place.asked), cure=_CONSTANT) from None
            except AdapterkitError as error:
                raise error.at(where=str(place.asked)) from None
            parts.append((place, cast("FormulaLayer", seen), new))
        experts_changed(layer, parts)


def _overlap(one: ResolvedTarget, other: ResolvedTarget) -> bool:
    (a, b), (c, d) = (place.target.rows or (0, 0) for place in (one, other))
    return a < d and c < b


def _apart(spot: Spot, building: Building, apart: dict[ir.Node, ir.Node]) -> Spot:
    """If a spot is a fused attention node, return the spot of its projection; return any other spot unchanged.

    The first call for a fused attention node splits the projection off.
    """
    if not issubclass(spot.kind, Attention):
        return spot
    if spot.node not in apart:
        apart[spot.node] = taken_apart(spot.node, building)
    kind: type[GraphLayer] = MatMulIntegerToFloat if issubclass(spot.kind, QAttention) else MatMul
    return replace(spot, node=apart[spot.node], kind=kind)


def _attach(
    place: ResolvedTarget, spot: Spot | None, building: Building, slots: Slots | RowSlots | None, words: CallWords
) -> None:
    branch = Branch(building, f"adapterkit/{place.target}")
    layer = _layer(place, spot, branch)
    layer.call = words.at(layer)
    core: GraphLayer | Ended | Normed = layer
    if place.norm is not None:
        assert isinstance(layer, GraphLayer)  # If a norm is folded, `_layer` returns no other type.
        core = Normed(layer, place.norm)
    seen: TargetView = Slice(core, place.target.rows) if place.target.rows else Turned(core) if place.turned else core
    _check(place, layer, core.bias)
    if isinstance(slots, RowSlots):
        y = slots.output(seen, layer, place)
        y = seen.around(core(core.x), y) if isinstance(seen, Slice) else y
        _insert(layer, y.value, branch)
        return
    given = [_valued(update, layer, place, position, slots) for position, update in enumerate(place.updates)]
    more = computes_apart(layer, place)
    if spot is not None and spot.kind.inside:
        assert isinstance(layer, GraphLayer)  # For such a node, `_layer` returns no other type.
        _change_inside(given, seen, layer, place, slots, spot)
        return
    try:
        if slots is None:
            written = [_sayable(update, seen, branch, True) for update in given]
        else:
            written = [_slotted(one, position, seen, layer, place, slots) for position, one in enumerate(given)]
        y = _output(seen, written, added=slots is not None, more=more)
        y = seen.around(core(core.x), y) if isinstance(seen, Slice) else y
        y = core.around(y) if isinstance(core, Normed) else y
    except (AttributeError, TypeError) as error:  # The formula uses an array operation that graph values lack.
        outer = any(isinstance(update, OutputUpdate) for update in place.updates)
        cure = _CONSTANT if slots is not None else _KEEP if outer else "Merge the adapter instead"
        raise Unsupported(
            f"the formula cannot be written as nodes: {error}", where=str(place.asked), cure=cure
        ) from None
    except AdapterkitError as error:
        raise error.at(where=str(place.asked)) from None
    _insert(layer, y.value, branch)


def _new_weights(
    given: Sequence[Update], seen: TargetView, layer: GraphLayer, place: ResolvedTarget, slots: Slots | None
) -> list[Update]:
    """Replace each update whose formula for the weight or the bias cannot be written as nodes.

    Without `slots`, the replacement is an equal update with constants. With `slots`, the replacement is an
    `OpenFactors`, and its factors are slots.

    Raises:
        Unsayable: nodes cannot compute the weight from the slots of an update.
    """
    if slots is None:
        return [_weighable(update, seen, layer.branch) or _worked_out(update, seen) for update in given]
    new = []
    for position, update in enumerate(given):
        one = _weighable(update, seen, layer.branch)
        one = one or slots.factored(place.updates[position], layer, place, position)
        if one is None:
            raise Unsayable(f"nodes cannot compute the changed weight of {update.method}")
        new.append(one)
    return new


def _change_inside(
    given: Sequence[Update], seen: TargetView, layer: GraphLayer, place: ResolvedTarget, slots: Slots | None, spot: Spot
) -> None:
    """Insert nodes that compute the changed weight and bias, and let the layer's node read the results."""
    try:
        new = _new_weights(given, seen, layer, place, slots)
        changed_inside(layer, cast("FormulaLayer", seen), place, new, spot)
    except (AttributeError, TypeError) as error:  # The formula uses an array operation that graph values lack.
        cure = _CONSTANT if slots is not None else "Merge the adapter instead"
        raise Unsupported(
            f"the formula cannot be written as nodes: {error}", where=str(place.asked), cure=cure
        ) from None
    except AdapterkitError as error:
        raise error.at(where=str(place.asked)) from None


def _weighable(update: Update, seen: TargetView, branch: Branch) -> Update | None:
    """Return the update if nodes can compute the layer's new weight and bias from it; otherwise None."""
    before = len(branch.nodes)
    try:
        chain = Composed(cast("FormulaLayer", seen), update)
        _ = chain.weight, chain.bias
    except (AttributeError, TypeError):
        return None
    finally:
        branch.back_to(before)
    return update


def in_order(places_found: Sequence[ResolvedTarget], graph: ir.Graph) -> list[ResolvedTarget]:
    """Return the targets in the order in which to attach them: first the targets whose input an update changes.

    Such a target must be attached before the layers inside it, because the nodes that are added for these layers read
    the changed input. The targets with a changed input are sorted in the graph's order, because a shadow network passes
    its state from block to block.

    Raises:
        Unsupported: an update changes the input of a target that is inside a subgraph.
    """
    moving = [place for place in places_found if any(getattr(update, "moves_input", False) for update in place.updates)]
    if not moving:
        return list(places_found)
    at = {node: position for position, node in enumerate(graph)}
    places: dict[ResolvedTarget, int] = {}
    for place in moving:
        if place.last is None or place.last not in at:
            why = "an update changes the input of this target, and the target is in a subgraph"
            raise Unsupported(why, where=str(place.asked), cure=_KEEP)
        places[place] = at[place.last]
    return [*sorted(moving, key=lambda place: places[place]), *(place for place in places_found if place not in places)]


def _layer(place: ResolvedTarget, spot: Spot | None, branch: Branch) -> GraphLayer | Ended:
    """Return the layer to pass to the update formulas: an `Ended` if the target has an outlet, else a `GraphLayer`."""
    if spot is None:
        assert place.outlet is not None
        return Ended(place.outlet, branch)
    if place.norm is not None and place.outlet is not None:
        why = f"the update has a residual or norm, but the {place.norm.kind} {place.norm.name} is folded into the layer"
        raise Unsupported(why, where=str(place.asked), cure=_UNFOLDED)
    if spot.kind.inside:
        refuse_outputs(place, spot.node.op_type)
    layer = spot.kind(spot.node, branch)
    return layer if place.outlet is None else Ended(place.outlet, branch, layer)


def _check(place: ResolvedTarget, layer: GraphLayer | Ended, bias: object) -> None:
    outer = [isinstance(update, OutputUpdate) for update in place.updates]
    # An output update reads the output of the changed weight, so no weight update may come after an output update.
    if outer != sorted(outer):
        why = "an update of the weight comes after an update of the output"
        raise Unsupported(why, where=str(place.asked), cure="Put the updates of weights before the updates of outputs")
    for update in place.updates:
        if isinstance(update, OutputUpdate) and place.target.rows:
            why = f"{update.method} changes the whole output, but the target is only a range of the layer's rows"
            raise Unsupported(why, where=str(place.asked), cure="Target the whole layer")
        if update.changes_bias and update.needs_bias and bias is None and not isinstance(update, Additive):
            why = f"{update.method} changes a bias that the layer does not have"
            raise Unsupported(why, where=str(place.asked), cure="Give the layer a bias")
        if (update.changes_bias or update.kind == "output") and isinstance(layer, GraphLayer):
            refuse_fused_bias(layer, str(place.asked))


def _valued(
    update: Update, layer: GraphLayer | Ended, place: ResolvedTarget, position: int, slots: Slots | None
) -> Update:
    """Return the update with its tensors replaced by graph values in the dtype in which the layer computes."""
    if slots is not None:
        return slots.opened(update, layer, place, position)
    building, dtype = layer.branch.building, layer.dtype
    name = (
        f"{place.target}.{update.method}" if len(place.updates) == 1 else f"{place.target}.{position}.{update.method}"
    )

    def value(field: str, leaf: Leaf) -> Value:
        def converted(to: Dtype) -> Array:
            array: Array = as_array(leaf)
            return array.astype("i8" if array.dtype.kind in "iu" else to)

        key = building.keep(leaf), dtype.str
        constant = building.tensor(key, f"{name}.{field}", lambda: converted(dtype))
        assert constant.const_value is not None
        kind = constant.const_value.dtype.numpy()
        return Value(layer.branch, tuple(leaf.shape), kind, constant, lambda: converted(np.dtype(np.float64)))

    return update.replace(**{field: value(field, leaf) for field, leaf in update.tensors.items()})


def _sayable(update: Update, layer: TargetView, branch: Branch, constant: bool) -> Update:
    """Return the update if its formula can be written as nodes.

    Otherwise, return an equal update with a constant weight, or raise `Unsayable` if `constant` is False.
    """
    # Run the formula to see whether it fails, and remove the nodes that this trial appended to the branch.
    if isinstance(update, OutputUpdate):
        return update
    before = len(branch.nodes)
    try:
        _output(layer, [update])
    except (AttributeError, TypeError) as error:
        if not constant:
            raise Unsayable(str(error)) from error
        return _worked_out(update, layer)
    finally:
        branch.back_to(before)
    return update


def _slotted(
    update: Update, position: int, seen: TargetView, layer: GraphLayer | Ended, place: ResolvedTarget, slots: Slots
) -> Update:
    """Return the update if its formula can be written as nodes; else an `OpenFactors` whose factors are slots."""
    try:
        return _sayable(update, seen, layer.branch, False)
    except (AttributeError, TypeError):
        factors = slots.factored(place.updates[position], layer, place, position)
        if factors is None:
            raise
        return factors


def _worked_out(update: Update, layer: TargetView) -> Update:
    """Apply an update to the layer's known weight in float64, and return the result as a constant update.

    Returns:
        For an additive update, the weight's change; otherwise, the new weight. The result is rounded only once.
    """
    computed = computed_over(update, lambda leaf: _numbers(cast(Value, leaf)))
    if isinstance(computed, Additive):
        D: Any = computed.delta(layer.shape) if computed.changes_weight else None
        return Dense(D=_constant(layer, D), d=_constant(layer, computed.bias_delta()))
    W: Any = known_weight(layer).numbers().astype(np.float64)
    computed = computed.settled(W) if computed.bias_sees_weight else computed
    weight: Any = computed.new_weight(W) if computed.changes_weight else None
    b = layer.bias if computed.changes_bias else None
    known: Any = None if b is None else b.numbers().astype(np.float64)
    bias = None if b is None else computed.new_bias(known)
    return Replacement(weight=_constant(layer, weight), bias=_constant(layer, bias))


def _numbers(value: Value) -> Array:
    assert value.known is not None
    return np.array(value.known())


def _constant(layer: TargetView, array: Tensor | None) -> Tensor | None:
    """Return an array as a constant graph value in the layer's dtype; declared as a `Tensor` for the type checker."""
    if array is None:
        return None
    kind = known_weight(layer).dtype
    return cast("Tensor", Value(layer.branch, array.shape, kind, None, lambda: np.asarray(array)))


def _output(layer: TargetView, updates: Sequence[Update], added: bool = False, more: bool = False) -> Value:
    """Return the layer's output after the updates.

    If the layer is not `direct`, such as a convolution with groups, compute the output from the changed weight and
    bias. Do not use the updates' formulas for the output.

    Args:
        layer: the layer.
        updates: the updates of the layer, in order.
        added: True to compute only the change of the output, and add it to the layer's output. If the updates change
            nothing, every bit of the output then stays the same.
        more: True to keep the layer's output and add to it the change of the product `W @ x`; see `computes_apart`.
    """
    outer = [update for update in updates if isinstance(update, OutputUpdate)]
    inner = updates[: len(updates) - len(outer)]
    weights = all(isinstance(update, WeightUpdate) for update in inner)
    sums = all(isinstance(update, Additive) for update in inner)
    # The casts are needed because the formulas are typed for torch tensors. Graph values support the same operators.
    chain = cast("FormulaLayer", layer)
    for update in updates:
        chain = cast("FormulaLayer", Composed(chain, update))
    # With `more`, use the formulas only if all `inner` updates are additive. The formulas of additive updates add to
    # the layer's output, but the formulas of other weight updates replace this output with a new product.
    if (layer.direct and (sums if more else not added or not weights)) or not inner:
        return cast(Value, chain(cast("Tensor", layer.x)))
    if outer:
        raise Unsayable("an update of the output comes after an update of the weight")
    if not added and not more:
        y = layer.op(layer.x, cast(Value, chain.weight))
        return y if chain.bias is None else y + layer.per_channel(cast(Value, chain.bias))
    y = layer(layer.x) + layer.op(layer.x, cast(Value, chain.weight) - known_weight(layer))
    return y if layer.bias is None else y + layer.per_channel(cast(Value, chain.bias) - layer.bias)


def _insert(layer: GraphLayer | Ended, new: ir.Value, branch: Branch) -> None:
    """Replace a layer's output, and its input if an update changes the input; remove the layer's unused nodes."""
    last = layer.end.producer()
    if isinstance(layer, Ended) and layer.moved is not None:
        graph = None if layer.node is None else layer.node.graph
        if any(use.node.graph is not graph for use in layer.x.value.uses() if use.node.graph is not None):
            raise Unsupported("a subgraph reads the input of this block", where=branch.name, cure=_KEEP)
        before(layer.outlet.nodes, layer.x.value, layer.moved.value, branch)
    behind(layer.end, new, branch)
    assert isinstance(layer.call, Heard)
    if not layer.call.shadow.hand_on(new):
        branch.close()
    for node in dict.fromkeys((last, layer.node)):
        if node is None or node.graph is None:
            continue
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            node.graph.remove(node, safe=True)


_PARTIAL = "--allow-partial (allow_partial=True)"

_PACKED = "GRAPH A -o OUT --quantized requantize (quantized='requantize'), or with dequantize instead"
_UNFOLDED = "Export the graph without folding: torch.onnx.export(..., optimize=False)"
_KEEP = "Keep the adapter in the torch model"
_CONSTANT = "Inject the adapter with --mode constant (mode='constant')"
