"""Adaption prompts in a graph: what an attention's queries make of a prompt is added to its heads' outputs.

The prompt's keys and values are the attention's own projections of it, worked out when it is attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..adapter import Target
from ..errors import ShapeMismatch, Unsupported
from ..tensors.lazy import as_array
from ..updates import ContextUpdate
from .attaching import rename_output
from .attentions import Attention, attention_at, without_factors
from .building import Branch, Building, element_type
from .layers import Layer
from .resolving import spots_of
from .values import Value

SEPARATE, FUSED = ("k_proj", "v_proj", "o_proj"), ("c_attn", "c_proj")
"""What attentions of Llama's kind, and of GPT-2's, call their projections."""


def with_prompts(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    """Puts prompts beside what an attention gives.

    Raises:
        TargetNotFound: there is no such module.
        Unsupported: it is no attention of Llama's kind or GPT-2's.
        ShapeMismatch: a prompt is of another width.
    """
    at = attention_at(building.model, target)
    branch = Branch(building, f"adapterkit/{target}")
    layers = _projections(at, branch, building.model, target)
    for update in updates:
        added = _added(update, at, layers, branch, target)
        if update.attributes["projected"]:
            _before(layers[SEPARATE[2] if SEPARATE[2] in layers else FUSED[1]], added, branch)
        else:
            _behind(at.module.given(added.shape[-1], str(target)), added, branch)


def _projections(at: Attention, branch: Branch, model: ir.Model, target: Target) -> Mapping[str, Layer]:
    own = set(at.module.nodes)
    found: dict[str, Layer] = {}
    for spot in (spot for spot in spots_of(model) if spot.node in own):
        names = {name.split(".")[-2] for said in spot.names.values() for name in said if name.count(".") > 0}
        for name in names & {*SEPARATE, *FUSED}:
            found[name] = spot.kind(spot.node, branch)
    if not ({*SEPARATE} <= {*found} or {*FUSED} <= {*found}):
        why = f"the module {at.module.path} is no attention of Llama's kind or GPT-2's"
        raise Unsupported(why, where=str(target), cure="Choose the attentions of such a model")
    return found


def _added(update: ContextUpdate, at: Attention, layers: Mapping[str, Layer], branch: Branch, target: Target) -> Value:
    """What joins the heads' outputs, `[rows, positions, heads * d]`."""
    queries = without_factors(at.scores.inputs[0])
    kind, d = element_type(at.mixed.outputs[0].dtype), at.width

    def value(array: Any) -> Value:
        return Value(branch, array.shape, kind, None, lambda: array)

    P = as_array(update.tensors["P"]).astype(np.float64)
    k, v = (value(_of_heads(array, at.heads, d)) for array in _keys_values(P, layers, target))
    held: Any = update.map(lambda leaf: value(as_array(leaf).astype(np.float64)))  # type: ignore[arg-type, return-value]
    heads = held.attention(Value(branch, (None, at.heads, None, d), kind, queries), k, v).swapaxes(1, 2)
    out: Value = heads.reshape(*heads.shape[:2], at.heads * d)
    return out


def _keys_values(P: Any, layers: Mapping[str, Layer], target: Target) -> tuple[Any, Any]:
    if "c_attn" in layers:
        _, k, v = np.split(_projected(P, layers["c_attn"], target), 3, -1)
        return k, v
    return _projected(P, layers["k_proj"], target), _projected(P, layers["v_proj"], target)


def _projected(P: Any, layer: Layer, target: Target) -> Any:
    W = layer.weight.numbers().astype(np.float64)
    if P.shape[1] != W.shape[1]:
        why = f"made for {P.shape[1]} channels; the attention reads {W.shape[1]}"
        raise ShapeMismatch(why, where=str(target), cure="Is this the base that the adapter was trained on?")
    y = P @ W.T
    return y if layer.bias is None else y + layer.bias.numbers()


def _of_heads(array: Any, heads: int, d: int) -> Any:
    """`[n, groups * d]` as `[heads, n, d]`."""
    split = array.reshape(len(array), -1, d).swapaxes(0, 1)
    return np.repeat(split, heads // len(split), 0)


def _before(layer: Layer, added: Value, branch: Branch) -> None:
    """The layer that mixes the heads reads the sum."""
    old = layer.given
    new = branch.node("Add", [old, added.value], None, added.dtype, None)
    nodes = branch.only_for([new])
    uses = [use for use in old.uses() if use.node not in nodes]
    graph = uses[0].node.graph
    assert graph is not None
    first = next(node for node in graph if node in {use.node for use in uses})
    graph.insert_before(first, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, new)
    branch.nodes.clear()


def _behind(old: ir.Value, added: Value, branch: Branch) -> None:
    """Who reads the attention's output reads the sum."""
    old = branch.building.now(old)
    new = branch.node("Add", [old, added.value], None, added.dtype, None)
    nodes, last = branch.only_for([new]), old.producer()
    assert last is not None
    graph = last.graph
    assert graph is not None
    for use in [use for use in old.uses() if use.node not in nodes]:
        use.node.replace_input_with(use.idx, new)
    graph.insert_after(last, nodes)
    if old.is_graph_output():
        rename_output(graph, old, new, branch)
    branch.building.moved[old] = new
    branch.nodes.clear()
