"""Adaption prompts in a graph: the attention of the queries to a prompt is added to the heads' outputs.

The prompt's keys and values are the attention's own projections of it, computed when it is attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Target
from ..core.updates import ContextUpdate
from ..errors import ShapeMismatch, Unsupported
from ..io.lazy import as_array
from .attentions import Attention, attention_at, without_factors
from .building import Branch, Building, element_type
from .inserting import before, behind, readers_of
from .layers import Layer
from .resolving import spots_of
from .values import Value

SEPARATE, FUSED = ("k_proj", "v_proj", "o_proj"), ("c_attn", "c_proj")
"""Names of the projections in attentions like Llama's, and like GPT-2's."""


def with_prompts(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    """Add the attention to prompts to an attention's output.

    Raises:
        TargetNotFound: there is no such module.
        Unsupported: it is not an attention like Llama's or GPT-2's.
        ShapeMismatch: a prompt has another width.
    """
    at = attention_at(building.model, target)
    branch = Branch(building, f"adapterkit/{target}")
    layers = _projections(at, branch, building.model, target)
    for update in updates:
        added = _added(update, at, layers, branch, target)
        if update.attributes["projected"]:
            mixes = layers[SEPARATE[2] if SEPARATE[2] in layers else FUSED[1]]
            before(readers_of(mixes.given, branch), mixes.given, _sum(mixes.given, added, branch), branch)
        else:
            given = building.now(at.module.given(added.shape[-1], str(target)))
            behind(given, _sum(given, added, branch), branch)
        branch.close()


def _sum(value: ir.Value, added: Value, branch: Branch) -> ir.Value:
    return branch.node("Add", [value, added.value], None, added.dtype, None)


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
    """Return the values to add to the heads' outputs, `[rows, positions, heads * d]`."""
    queries = without_factors(at.scores.inputs[0])
    kind, d = element_type(at.mixed.outputs[0]), at.width

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
    """Reshape `[n, groups * d]` to `[heads, n, d]`, repeating the groups of grouped queries."""
    split = array.reshape(len(array), -1, d).swapaxes(0, 1)
    # In grouped-query attention, several query heads share a key head.
    return np.repeat(split, heads // len(split), 0)
