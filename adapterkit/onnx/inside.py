"""Compute a layer's changed weight in nodes before the layer, if nodes after the layer cannot correct its output.

A recurrent layer reads its own state, and a fused layer applies an activation. For such a layer, injected nodes compute
the changed weight from the base's weight and the adapter's tensors, and the layer's node reads the changed weight. If
the adapter's tensors are constants, onnxruntime computes the weight once, when a session starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ..core.updates import Composed, OutputUpdate, Update
from ..errors import Unsupported
from .layers import BEFORE, weight_at
from .norms import groups_of
from .operands import is_constant
from .values import Value, concatenated

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..core.updates.update import Layer as FormulaLayer
    from .layers import GraphLayer
    from .resolved import ResolvedTarget, Spot


def refuse_outputs(place: ResolvedTarget, op_type: str) -> None:
    """Refuse updates that change a layer's output directly, instead of its weight or bias.

    Raises:
        Unsupported: an update is an `OutputUpdate`.
    """
    for update in place.updates:
        if isinstance(update, OutputUpdate):
            why = f"{update.method} changes an output that exists only inside a {op_type} node"
            raise Unsupported(why, where=str(place.asked), cure="Keep the adapter in the torch model")


def changed_inside(
    layer: GraphLayer, seen: FormulaLayer, place: ResolvedTarget, updates: Sequence[Update], spot: Spot
) -> None:
    """Insert nodes that compute the changed weight and bias, and make the layer's node read the results.

    Args:
        layer: the whole layer. Its node will read the changed weight and bias.
        seen: the layer that the updates change, e.g. only the target's rows of the whole layer.
        place: the target.
        updates: the updates, with graph values in place of tensors.
        spot: the layer's node in the graph, and which of the node's outputs belong to the layer.

    Raises:
        Unsupported: an update needs a bias, but the node has none; or an update changes the bias, but the target is
            only a range of rows.
    """
    branch, chain = layer.branch, seen
    for update in updates:
        chain = cast("FormulaLayer", Composed(chain, update))
    W, new = layer.weight, None
    if any(update.changes_weight for update in updates):
        part = cast(Value, chain.weight)
        if place.norm is not None:
            # The graph stores the base's weight multiplied by the norm's scale, so multiply the change by this scale.
            rows = slice(*place.target.rows) if place.target.rows else slice(None)
            current = W[rows] if place.target.rows else W
            part = current + (part - cast(Value, seen.weight)) * W.like(place.norm.factors(groups_of(spot))[rows])
        new = _whole(W, part, place)
    bias: Value | None = None
    changing = [update for update in updates if update.changes_bias]
    if changing and (layer.bias is not None or any(update.needs_bias for update in changing)):
        if layer.bias is None or place.target.rows:
            why = "the update changes a bias, but the target is a row slice"
            why = f"the update adds a bias, but this {layer.node.op_type} node has none" if layer.bias is None else why
            raise Unsupported(why, where=str(place.asked), cure="Keep the adapter in the torch model")
        changed = cast("Value | None", chain.bias)
        bias = changed
        if changed is not None and place.norm is not None:
            # The graph stores the base's bias b as `scale * b + shift`, so multiply the change of b by the scale.
            before = cast("Value | None", seen.bias)
            bias = layer.bias + (changed if before is None else changed - before) * layer.bias.like(place.norm.scale)
    graph = layer.node.graph
    assert graph is not None
    bias = None if bias is None else layer.back_bias(bias)
    operands = [value for value in (None if new is None else layer.back(new), bias) if value is not None]
    graph.insert_before(layer.node, branch.waiting([value.value for value in operands]))
    if new is not None:
        _reads(layer.node, layer.position, layer.operand, operands[0])
    if bias is not None:
        node, read = (layer.node, layer.constant_bias) if layer.after is None else layer.after
        # If the weight and the bias have equal values, the graph may store them as one tensor, which the node reads
        # twice. So search for the bias only among the inputs after the weight.
        first = layer.position + 1 if node is layer.node else 0
        at = next(at for at, one in enumerate(node.inputs) if at >= first and weight_at(node, at) is read)
        _reads(node, at, read, bias)
    branch.close()


def experts_changed(layer: GraphLayer, parts: Sequence[tuple[ResolvedTarget, FormulaLayer, Sequence[Update]]]) -> None:
    """Insert nodes that compute the changed weights and biases of all experts, and make the node read the results.

    One Concat replaces the rows of all targets, because one Concat per target would copy the whole stack each time.

    Args:
        layer: the stack of experts.
        parts: for each target: the target, a layer that shows only the target's rows, and the updates. The rows of the
            targets do not overlap.
    """
    W, b = layer.weight, layer.bias
    weights: list[tuple[tuple[int, int], Value]] = []
    biases: list[tuple[tuple[int, int], Value]] = []
    for place, seen, updates in parts:
        chain = seen
        for update in updates:
            chain = cast("FormulaLayer", Composed(chain, update))
        assert place.target.rows is not None
        if any(update.changes_weight for update in updates):
            part = cast(Value, chain.weight)
            weights.append((place.target.rows, part.swapaxes(0, 1) if place.turned else part))
        if b is not None and any(update.changes_bias for update in updates):
            biases.append((place.target.rows, cast(Value, chain.bias)))
    new = layer.back(_joined(W, weights)) if weights else None
    bias = layer.back_bias(_joined(b, biases)) if b is not None and biases else None
    graph, changed = layer.node.graph, [value for value in (new, bias) if value is not None]
    assert graph is not None
    graph.insert_before(layer.node, layer.branch.waiting([value.value for value in changed]))
    if new is not None:
        _reads(layer.node, layer.position, layer.operand, new)
    if bias is not None:
        read = layer.constant_bias
        at = next(
            at for at in range(len(layer.node.inputs)) if at > layer.position and weight_at(layer.node, at) is read
        )
        _reads(layer.node, at, read, bias)
    layer.branch.close()


def _joined(whole: Value, parts: Sequence[tuple[tuple[int, int], Value]]) -> Value:
    """Return a matrix or vector with some ranges of its rows replaced."""
    pieces, end = list[Value](), 0
    for (start, stop), part in sorted(parts, key=lambda each: each[0]):
        pieces += [whole[end:start], part] if end < start else [part]
        end = stop
    return concatenated([*pieces, *([whole[end:]] if end < whole.shape[0] else [])], 0)


def _reads(node: ir.Node, position: int, base: ir.Value | None, new: Value) -> None:
    """Make a node read a computed weight or bias; record the name of the base's tensor for `weight_at`."""
    if base is not None and base.name is not None and is_constant(base):
        node.metadata_props[f"{BEFORE}.{position}"] = base.name
    node.replace_input_with(position, new.value)


def _whole(W: Value, part: Value, place: ResolvedTarget) -> Value:
    """Return the layer's whole weight, with the target's rows replaced by `part`."""
    if place.turned:
        part = part.swapaxes(0, 1)
    if not place.target.rows:
        return part
    start, stop = place.target.rows
    pieces = [W[:start]] if start else []
    pieces.append(part)
    if stop < W.shape[0]:
        pieces.append(W[stop:])
    return concatenated(pieces, 0)
