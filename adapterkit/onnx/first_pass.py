"""A first pass: what a graph's last layer gives without the adapter, by a copy of the nodes that compute it.

The copy reads the same stored tensors. A graph with a past has none: what the past holds was computed with the adapter.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..errors import Unsupported, UsageError
from .building import Building
from .copies import Copies, between, copied
from .layers import MatMul
from .past import past_inputs
from .resolving import spots_of

WORD = "hidden_states"

KNOWN = ("last_hidden_state", WORD)
"""Names of outputs that are it."""


def first_pass(building: Building, told: Any) -> ir.Value:
    """Copies the nodes in front of the last layer's output; returns the copy's.

    Args:
        building: the model, before anything of it is changed.
        told: the name of the value; else it is the output of this name, or what the head of `logits` reads.

    Raises:
        UsageError: the graph has no such value, or does not show which it is.
        Unsupported: it has inputs of a past, or nodes with graphs inside.
    """
    if past_inputs(building.model.graph):
        why = "a first pass without the adapter, where past keys and values were computed with it"
        raise Unsupported(why, cure="Export the model without past keys and values")
    value, graph = _last(building.model, told), building.model.graph
    copies: Copies = {}
    nodes = copied(between(None, value, list(graph)), copies, lambda name: building.name(f"{_NAME}/{name}"))
    graph.insert_before(graph[0], nodes)
    return copies.get(value, value)


def _last(model: ir.Model, told: Any) -> ir.Value:
    values = {out.name: out for node in model.graph for out in node.outputs}
    if told is not None:
        if told not in values:
            raise UsageError(f"the graph has no value {told}", where=f"call: {WORD}", cure="Name an output of a node")
        return values[told]
    for out in model.graph.outputs:
        if out.name in KNOWN:
            return out
    heads = [spot for spot in spots_of(model) if issubclass(spot.kind, MatMul) and _is_head(spot.node)]
    if len(heads) == 1 and heads[0].node.inputs[0] is not None:
        return heads[0].node.inputs[0]
    why = "the graph does not show what its last layer gives"
    raise UsageError(why, where=f"call: {WORD}", cure=f"Name the value: call={{{WORD!r}: NAME}}, --call {WORD}=NAME")


def _is_head(node: ir.Node) -> bool:
    """Whether a node's output is `logits`, but for a bias or a cast."""
    value = node.outputs[0]
    while not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in ("Add", "Cast", "Identity"):
            return False
        value = uses[0].node.outputs[0]
    return value.name == "logits"


_NAME = "adapterkit/first_pass"
