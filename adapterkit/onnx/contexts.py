"""Context in graphs: soft prompts and new tokens at the embedding, prefixes as the initial past.

A soft prompt becomes new token numbers after the vocabulary, like the tokens of textual inversion. An input that
begins with these numbers, with a mask and positions that count them, starts with the prompt. If a module adds positions
itself, those do not count the prompt. A prefix becomes the default of the graph's inputs of past keys and values, for a
batch of one; the mask must count it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..core.updates import ContextUpdate
from ..errors import ShapeMismatch, TargetNotFound, Unsupported
from ..io.lazy import as_array
from .attentions import with_prefixes
from .building import Array, Branch, Building, element_type
from .convolutions import Gather
from .embeddings import new_tokens, read_by, with_tokens_behind
from .inserting import before, behind
from .modules import modules_of
from .past import past_inputs
from .prompts import with_prompts
from .resolving import Spot, spots_of
from .scopes import same_end

PLACES = ("embeddings", "vocabulary", "past", "prefix", "attention")
"""Places of context updates that a graph can provide."""


def parted(adapter: Adapter) -> tuple[Adapter, list[tuple[Target, ContextUpdate]]]:
    """Split an adapter into updates of layers, and context that has a place in a graph."""
    context = [(target, update) for target, update in adapter if isinstance(update, ContextUpdate) and _placed(update)]
    kept = {
        target: rest
        for target, updates in adapter.updates.items()
        if (rest := tuple(update for update in updates if not _placed(update)))
    }
    return adapter.replace(updates=kept), context


def of_attention(target: Target, update: ContextUpdate) -> bool:
    """Whether an update is a prefix or prompt of a single attention, not of the whole model."""
    return update.place in ("prefix", "attention") or (update.place == "past" and bool(target.path))


def _at_attention(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    prompts = [update for update in updates if update.place == "attention"]
    prefixes = [update for update in updates if update.place != "attention"]
    if prompts:
        with_prompts(target, prompts, building)
    if prefixes:
        with_prefixes(target, prefixes, building)


def _placed(update: Any) -> bool:
    return isinstance(update, ContextUpdate) and update.place in PLACES


def place(context: Sequence[tuple[Target, ContextUpdate]], building: Building) -> str:
    """Put prompts, new tokens and a prefix into a graph; return a sentence on how to use them.

    Args:
        context: the second result of `parted`.
        building: the model that is being changed.

    Raises:
        TargetNotFound: the graph shows no token embedding, or has no past.
        ShapeMismatch: the context has another size than the graph.
        Unsupported: there are two prefixes.
    """
    rows: list[tuple[Target, Array]] = []
    pasts: list[tuple[Target, Array]] = []
    beside: dict[Target, list[ContextUpdate]] = {}
    for target, update in context:
        if of_attention(target, update):
            beside.setdefault(target, []).append(update)
            continue
        held = update.map(_wide)
        if update.place == "past":
            pasts.append((target, _numbers(held.past())))
        else:
            found = held.embeddings() if update.place == "embeddings" else held.vocabulary()
            rows.append((target, _numbers(found)))
    if len(pasts) > 1:
        raise Unsupported("two prefixes", where=str(pasts[1][0]), cure="Inject one of them")
    said = [_with_tokens(target, more, building) for target, more in rows[:1]] if len(rows) == 1 else []
    if len(rows) > 1:
        said.append(_with_tokens(rows[0][0], np.concatenate([more for _, more in rows]), building))
    said += [_with_past(target, past, building) for target, past in pasts]
    for target, updates in beside.items():
        _at_attention(target, updates, building)
    return "; ".join(said)


def _wide(leaf: Any) -> Any:
    array = as_array(leaf)
    return array if array.dtype.kind in "iu" else array.astype(np.float64)


def _numbers(found: Any) -> Array:
    array: Array = np.asarray(found)
    return array


def _with_tokens(target: Target, more: Array, building: Building) -> str:
    """Extend an embedding: a new token looks up a row of a second table instead."""
    if _is_module(target, building.model):
        return with_tokens_behind(target, more, building)
    spot, branch = _embedding(target, building.model), Branch(building, f"adapterkit/{target or 'prompt'}")
    new = new_tokens(spot, more, target, branch)
    before([spot.node], new.ids, new.known, branch)
    behind(spot.node.outputs[0], new.instead_of(spot.node.outputs[0], branch), branch)
    branch.close()
    return new.said


def _is_module(target: Target, model: ir.Model) -> bool:
    """Whether a target is a module around embeddings, and not an embedding itself."""
    names = (name for spot in spots_of(model) if spot.kind is Gather for said in spot.names.values() for name in said)
    inside = any(target.path in modules_of(node) for node in model.graph)
    return bool(target.path) and inside and not any(same_end(n.removesuffix(".weight"), target.path) for n in names)


def _embedding(target: Target, model: ir.Model) -> Spot:
    """Return the embedding of the graph's input tokens."""
    spots = [spot for spot in spots_of(model) if spot.kind is Gather and read_by(spot.node) is not None]
    if target.path:
        names = [(spot, name) for spot in spots for said in spot.names.values() for name in said]
        spots = list(dict.fromkeys(s for s, name in names if same_end(name.removesuffix(".weight"), target.path)))
    elif len(spots) > 1:
        spots = [spot for spot in spots if "input_ids" in (read_by(spot.node) or "")]
    if len(spots) != 1:
        why = "the graph shows no embedding of tokens" if not spots else "several embeddings may be that of the tokens"
        raise TargetNotFound(why, where=str(target), cure="Target the embedding by its name")
    return spots[0]


def _with_past(target: Target, past: Array, building: Building) -> str:
    """Set a prefix as the default of the inputs of past keys and values."""
    inputs = past_inputs(building.model.graph)
    layers, _, heads, length, width = past.shape
    if not inputs:
        cure = "Export the model with past keys and values (adapterkit export)"
        raise TargetNotFound("the graph has no inputs of past keys and values", where=str(target), cure=cure)
    for (layer, _), value in inputs.items():
        sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
        fits = len(sizes) == 4 and sizes[1] in (None, heads) and sizes[3] in (None, width)
        if not fits or layer >= layers or len(inputs) != 2 * layers:
            why = (
                f"a prefix of {layers} layers, {heads} heads of {width}; the graph takes {sizes} in {len(inputs) // 2}"
            )
            raise ShapeMismatch(why, where=value.name, cure="Is this adapter made for this base?")
    for (layer, part), value in inputs.items():
        array = past[layer, ("key", "value").index(part)][None].astype(element_type(value))
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
        building.model.graph.register_initializer(value)
    return f"a run without its past begins with {length} tokens of prefix, which its mask and positions count"
