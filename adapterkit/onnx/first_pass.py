"""Compute the last layer's output without the adapter, by a copy of the nodes before it.

The copy reads the same stored tensors. A past was computed with the adapter, so the copy reads the past's tokens again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported, UsageError
from .building import Branch, element_type
from .copies import Copies, between, copied
from .every_token import MASK, POSITIONS, TOKENS, every_position, every_token, of_call
from .layers import MatMul
from .past import past_inputs
from .resolving import spots_of
from .values import plain

if TYPE_CHECKING:
    from .calls import Words

WORD = "hidden_states"

KNOWN = ("last_hidden_state", WORD)
"""Names of graph outputs that are the last layer's output."""


def first_pass(words: Words, told: Any) -> ir.Value:
    """Copy the nodes that compute the last layer's output; return the copy's output for the call's own tokens.

    Args:
        words: the words of the call, before anything of the graph is changed.
        told: the name of the value; by default, the output of a known name, or the input of the `logits` head.

    Raises:
        UsageError: the graph has no such value, or does not show which one it is.
        Unsupported: a copied node has a subgraph, or the graph has a past and inputs that cannot be extended to it.
    """
    building, graph = words.building, words.building.model.graph
    value, branch = _last(building.model, told), Branch(building, _NAME)
    copies = _without_past(words, branch) if past_inputs(graph) else {}
    branch.nodes += copied(between(None, value, list(graph)), copies, lambda name: building.name(f"{_NAME}/{name}"))
    end, ids = copies.get(value, value), words.input(TOKENS)
    if ids is not None:
        end = of_call(end, words, branch, plain(ids, branch))
    # At the front, because branches anywhere in the graph may read the result.
    graph.insert_before(graph[0], branch.nodes)
    return end


def _without_past(words: Words, branch: Branch) -> Copies:
    """Return replacements for the inputs: all tokens at once, and an empty past."""
    copies: Copies = {value: _emptied(value, branch) for value in past_inputs(words.building.model.graph).values()}
    ids, positions, mask = (words.input(name) for name in (TOKENS, POSITIONS, MASK))
    tokens = every_token(words, branch)
    assert ids is not None
    for value in words.building.model.graph.inputs:
        if value not in copies and value not in (ids, positions, mask) and not value.is_initializer():
            why = f"the graph's input {value.name} behind a past, of which a first pass over all tokens needs all"
            raise Unsupported(why, cure="Export the model without past keys and values")
    copies[ids] = _like(tokens, ids, branch)
    if positions is not None:
        own = plain(ids, branch).cast(np.int64)
        copies[positions] = _like(every_position(words, branch, positions, own), positions, branch)
    return copies


def _emptied(value: ir.Value, branch: Branch) -> ir.Value:
    """Return a past `[rows, heads, positions, width]` cut to zero positions."""
    zero, two = (branch.building.literal(np.array([n], dtype=np.int64)) for n in (0, 2))
    empty = branch.node("Slice", [value, zero, zero, two], None, element_type(value), None)
    empty.shape = None if value.shape is None else ir.Shape([*value.shape[:2], 0, *value.shape[3:]])
    return empty


def _like(value: ir.Value, other: ir.Value, branch: Branch) -> ir.Value:
    """Cast an integer matrix to another value's dtype."""
    return plain(value, branch).cast(element_type(other)).value


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
    """Whether a node's output is `logits`, except for a bias or a cast."""
    value = node.outputs[0]
    while not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in ("Add", "Cast", "Identity"):
            return False
        value = uses[0].node.outputs[0]
    return value.name == "logits"


_NAME = "adapterkit/first_pass"
