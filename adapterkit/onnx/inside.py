"""Change the weight of a node whose output nodes beside it cannot change: nodes before it compute the new weight.

A recurrent layer reads its own state, and a fused layer applies an activation. Such a node reads a weight that the
graph computes from the base's weight and the adapter's tensors. If the tensors are constants, onnxruntime computes the
weight once, when a session starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ..core.composed_layer import Composed
from ..core.updates import OutputUpdate, Update
from ..errors import Unsupported
from .layers import BEFORE
from .norms import groups_of
from .values import Value, concatenated

if TYPE_CHECKING:
    from ..core.updates.layer import Layer as FormulaLayer
    from .found import Found, Spot
    from .layers import Layer


def refuse_outputs(place: Found, op_type: str) -> None:
    """Refuse updates that change more than a weight and a bias.

    Raises:
        Unsupported: an update changes the output.
    """
    for update in place.updates:
        if isinstance(update, OutputUpdate):
            why = f"{update.method} changes an output that a {op_type} computes inside the node"
            raise Unsupported(why, where=str(place.asked), cure="Keep it in the torch model")


def changed_inside(layer: Layer, seen: FormulaLayer, place: Found, updates: Sequence[Update], spot: Spot) -> None:
    """Make a node read the changed weight and bias; insert the nodes that compute them before it.

    Args:
        layer: the node's layer.
        seen: the layer as the updates see it, e.g. some of its rows.
        place: the target.
        updates: the updates, with graph values in place of tensors.
        spot: the layer's place in the graph.

    Raises:
        Unsupported: an update changes a bias, and the node has none, or only a part of it is the target's.
    """
    branch, chain = layer.branch, seen
    for update in updates:
        chain = cast("FormulaLayer", Composed(chain, update))
    W, new = layer.weight, None
    if any(update.changes_weight for update in updates):
        part = cast(Value, chain.weight)
        if place.norm is not None:
            # The graph stores the base's weight times the norm's scale, so scale the change, too.
            rows = slice(*place.target.rows) if place.target.rows else slice(None)
            own = W[rows] if place.target.rows else W
            part = own + (part - cast(Value, seen.weight)) * W.like(place.norm.factors(groups_of(spot))[rows])
        new = _whole(W, part, place)
    bias = None
    if any(update.changes_bias for update in updates):
        if layer.bias is None or place.target.rows or place.norm is not None:
            why = f"the update changes a bias that a {layer.node.op_type} does not have as a whole"
            raise Unsupported(why, where=str(place.asked), cure="Keep it in the torch model")
        bias = cast("Value | None", chain.bias)
    graph = layer.node.graph
    assert graph is not None
    made = [value for value in (None if new is None else layer.back(new), bias) if value is not None]
    graph.insert_before(layer.node, branch.waiting([value.value for value in made]))
    if new is not None:
        key, held = f"{BEFORE}.{layer.position}", layer.operand
        if held.is_initializer() and held.name is not None:
            layer.node.metadata_props[key] = held.name
        layer.node.replace_input_with(layer.position, made[0].value)
    if bias is not None:
        holder, old = (layer.node, layer.own_bias) if layer.after is None else layer.after
        holder.replace_input_with(list(holder.inputs).index(old), bias.value)
    branch.close()


def _whole(W: Value, part: Value, place: Found) -> Value:
    """Return the layer's whole weight with the target's part replaced."""
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
