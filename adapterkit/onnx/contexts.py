"""Attach context to a graph.

Soft prompts and new tokens are added to embeddings. Prefixes and adaption prompts are added to attention modules. But a
prefix of the whole model becomes the default value of the graph's inputs for past keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..core.updates import ContextUpdate
from ..errors import USE_ITS_BASE, ShapeMismatch, TargetNotFound, Unsupported
from ..io.lazy import as_array
from ..naming.moves import same_end
from .attentions import AttentionNodes, attention_at, with_prefixes, without_factors
from .building import Array, Branch, Building, before, behind, between, element_type, readers_of
from .layers import Gather, GraphLayer
from .modules import Module, module_at, modules_of
from .operands import input_behind
from .resolved import Spot
from .resolving import spots_of
from .tokens import past_inputs
from .values import SYMBOLS, Value, computed_over, plain

if TYPE_CHECKING:
    from ..io.lazy import Leaf

# New tokens at a graph's embeddings. Their ids follow the ids of the vocabulary; their vectors are in a second table.
# The new vectors replace rows of the embedding's output. If a module also adds positions and token types, the new
# vectors replace rows of the module's output instead. In such a module, the new tokens do not shift the positions of
# later tokens.


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """Graph values that separate new tokens from the tokens of the vocabulary.

    Attributes:
        ids: the token ids.
        new: for each position, True if its token is new.
        known: the token ids, with 0 in place of each new token.
        vectors: for each position, the vector of its new token; row 0 of the table if the token is not new.
        ids_note: a sentence that tells the user the ids of the new tokens.
    """

    ids: ir.Value
    new: ir.Value
    known: ir.Value
    vectors: ir.Value
    ids_note: str

    def instead_of(self, embedded: ir.Value, branch: Branch) -> ir.Value:
        """Return `embedded`, but take the vectors at the positions of new tokens from `vectors`."""
        wide = branch.node("Unsqueeze", [self.new, branch.building.literal(np.array([-1]))], None, bool, None)
        return branch.node("Where", [wide, self.vectors, embedded], None, element_type(self.vectors), None)


def new_tokens(spot: Spot, more: Array, target: Target, branch: Branch) -> NewTokens:
    """Add nodes that detect new tokens and look up their vectors in a second table.

    The second table is `more`. It has one vector for each new token.

    Raises:
        ShapeMismatch: the vectors' size differs from the embedding's.
    """
    # A layer's weight is [out, in]; for an embedding, this is [width, tokens].
    (dim, count), building = spot.shape[:2], branch.building
    if more.shape[-1] != dim:
        raise ShapeMismatch(
            f"the vectors have {more.shape[-1]} channels, but the embedding has {dim}", where=str(target)
        )
    layer = Gather(spot.node, branch)
    ids, kind = layer.given, np.int64 if layer.given.dtype is None else layer.given.dtype.numpy()
    key_and_name = ("context", target), f"{target or 'prompt'}.P", lambda: more.astype(element_type(layer.operand))
    table = building.tensor(*key_and_name)
    first, zero = (building.literal(np.array(n, dtype=kind)) for n in (count, 0))
    new = branch.node("Not", [branch.node("Less", [ids, first], None, bool, None)], None, bool, None)
    # Each table's Gather gets all tokens. Replace the ids of the other table's tokens by 0, which is always valid.
    known = branch.node("Where", [new, zero, ids], None, kind, None)
    shifted = branch.node("Sub", [ids, first], None, kind, None)
    row = branch.node("Where", [new, shifted, zero], None, kind, None)
    vectors = branch.node("Gather", [table, row], {"axis": 0}, layer.dtype, None)
    return NewTokens(ids, new, known, vectors, f"the new tokens have the ids {count} to {count + len(more) - 1}")


def read_by(node: ir.Node) -> str | None:
    """Return the name of the graph input whose ids an embedding looks up; None if the graph computes the ids."""
    source = input_behind(node.inputs[1])
    return None if source is None else source.name


def with_tokens_behind(target: Target, more: Array, building: Building) -> str:
    """Insert the vectors of new tokens into the output of a module that sums several embeddings.

    Also lower the position ids, so that other tokens have the positions that they would have without the new tokens.

    Raises:
        TargetNotFound: the target does not match exactly one module. Or the module does not have exactly one embedding
            of `input_ids`, or does not have exactly one output of the vectors' width.
        ShapeMismatch: the vectors' size differs from the embedding's.
        Unsupported: the graph does not compute the positions that the module looks up. Or the graph has inputs for past
            keys and values. In that case, new tokens in the past would shift the positions of later tokens.
    """
    where = str(target)
    module = module_at(building.model, target.path, where)
    spots = [spot for spot in spots_of(building.model) if spot.kind is Gather and spot.node in module.nodes]
    tokens = [spot for spot in spots if "input_ids" in (read_by(spot.node) or "")]
    if len(tokens) != 1:
        why = f"the module {module.path} has {len(tokens)} embeddings of input_ids, but must have exactly one"
        raise TargetNotFound(why, where=where, cure="Export the model again with torch's exporter")
    branch = Branch(building, f"adapterkit/{target}")
    new = new_tokens(tokens[0], more, target, branch)
    counted = [spot.node for spot in spots if input_behind(spot.node.inputs[1]) is None]
    if past_inputs(building.model.graph):
        why = "new tokens do not work in a graph with past keys, because later position ids would include the tokens"
        raise Unsupported(why, where=where, cure="Export the model without past keys and values")
    if not counted:
        why = "the graph does not compute the positions that the module looks up"
        raise Unsupported(why, where=where, cure="Inject the adapter into the torch model instead")
    end = module.given(more.shape[-1], where)
    before([tokens[0].node], new.ids, new.known, branch)
    for node in counted:
        _uncounted(node, new, end, module, branch)
    behind(end, new.instead_of(end, branch), branch)
    branch.close()
    return f"{new.ids_note}; the positions of other tokens do not count the new tokens"


def _uncounted(node: ir.Node, new: NewTokens, end: ir.Value, module: Module, branch: Branch) -> None:
    """Lower each position id by the number of new tokens up to that position, but not below 0."""
    at = node.inputs[1]
    assert at is not None
    passed = plain(new.new, branch).cast(np.int64).cumsum(1)
    fewer: Any = SYMBOLS.clip(plain(at, branch).cast(np.int64) - passed, 0, None)
    before([node], at, fewer.value, branch)
    # In the original graph, all rows of a batch share one row of positions. Now each row has its own positions, so make
    # the batch axis of these values dynamic.
    for one in (node, *between(node.outputs[0], end, module.nodes)):
        for out in one.outputs:
            sizes = None if out.shape is None else list(out.shape)
            out.shape = ir.Shape([None, *sizes[1:]]) if sizes and sizes[0] == 1 else out.shape


# Add adaption prompts to a graph. The queries of an attention module also attend to a prompt. The result is added to
# the heads' outputs, or to the module's output. The module's own projections compute the prompt's keys and values once,
# when the prompt is attached.


SEPARATE, FUSED = ("k_proj", "v_proj", "o_proj"), ("c_attn", "c_proj")
"""Names of projections in attention modules: `SEPARATE` as in Llama, `FUSED` as in GPT-2, which fuses q, k and v."""


def with_prompts(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    """Add nodes, so that the queries of an attention module also attend to adaption prompts.

    The result for a prompt is added to the heads' outputs if the update is `projected`, otherwise to the module's
    output.

    Raises:
        TargetNotFound: the graph has no module with the target's path.
        Unsupported: the module is not an attention module like Llama's or GPT-2's.
        ShapeMismatch: a prompt's width differs from the attention module's.
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


def _projections(at: AttentionNodes, branch: Branch, model: ir.Model, target: Target) -> Mapping[str, GraphLayer]:
    module_nodes = set(at.module.nodes)
    layers_by_name: dict[str, GraphLayer] = {}
    for spot in (spot for spot in spots_of(model) if spot.node in module_nodes):
        names = {
            name.split(".")[-2] for names_here in spot.names.values() for name in names_here if name.count(".") > 0
        }
        for name in names & {*SEPARATE, *FUSED}:
            layers_by_name[name] = spot.kind(spot.node, branch)
    if not ({*SEPARATE} <= {*layers_by_name} or {*FUSED} <= {*layers_by_name}):
        why = f"the module {at.module.path} is not an attention like Llama's or GPT-2's"
        raise Unsupported(why, where=str(target), cure="Target the attention modules of a model like Llama or GPT-2")
    return layers_by_name


def _added(
    update: ContextUpdate, at: AttentionNodes, layers: Mapping[str, GraphLayer], branch: Branch, target: Target
) -> Value:
    """Attend to the prompt, and return the value that the caller adds to an output: `[batch, positions, heads * d]`."""
    queries = without_factors(at.scores.inputs[0])
    kind, d = element_type(at.mixed.outputs[0]), at.width

    def value(array: Array) -> Value:
        return Value(branch, array.shape, kind, None, lambda: array)

    P = as_array(update.tensors["P"]).astype(np.float64)
    k, v = (value(_of_heads(array, at.heads, d)) for array in _keys_values(P, layers, target))
    context: Any = computed_over(update, lambda leaf: value(as_array(leaf).astype(np.float64)))
    heads = context.attention(Value(branch, (None, at.heads, None, d), kind, queries), k, v).swapaxes(1, 2)
    out: Value = heads.reshape(*heads.shape[:2], at.heads * d)
    return out


def _keys_values(P: Array, layers: Mapping[str, GraphLayer], target: Target) -> tuple[Array, Array]:
    if "c_attn" in layers:
        _, k, v = np.split(_projected(P, layers["c_attn"], target), 3, -1)
        return k, v
    return _projected(P, layers["k_proj"], target), _projected(P, layers["v_proj"], target)


def _projected(P: Array, layer: GraphLayer, target: Target) -> Array:
    W = layer.weight.numbers().astype(np.float64)
    if P.shape[1] != W.shape[1]:
        why = f"the prompt was made for {P.shape[1]} channels, but the attention reads {W.shape[1]}"
        raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
    y: Array = P @ W.T
    return y if layer.bias is None else y + layer.bias.numbers()


def _of_heads(array: Array, heads: int, d: int) -> Array:
    """Split keys or values `[n, groups * d]` into `[heads, n, d]`."""
    split = array.reshape(len(array), -1, d).swapaxes(0, 1)
    # In grouped-query attention, several query heads share a key head, so repeat the key head for each of them.
    return np.repeat(split, heads // len(split), 0)


# Context of the whole model: soft prompts and new tokens at the embedding, and prefixes as the initial past.
# A soft prompt becomes new tokens with ids after the vocabulary, like the tokens of textual inversion. To use the
# prompt, begin an input with these ids, and extend the mask and the positions to cover them. If the embedding's module
# computes the positions itself, the prompt does not shift the positions of other tokens. A prefix becomes the default
# value of the inputs for past keys and values, with a batch size of 1. The mask and the positions must count the tokens
# of the prefix.


PLACES = ("embeddings", "vocabulary", "past", "prefix", "attention")
"""The values of `ContextUpdate.place` that a graph supports."""


def parted(adapter: Adapter) -> tuple[Adapter, list[tuple[Target, ContextUpdate]]]:
    """Separate an adapter's context updates that a graph supports from the rest of the adapter.

    Returns:
        the adapter without these context updates, and a list of these updates with their targets.
    """
    context = [(target, update) for target, update in adapter if isinstance(update, ContextUpdate) and _placed(update)]
    kept = {
        target: rest
        for target, updates in adapter.updates.items()
        if (rest := tuple(update for update in updates if not _placed(update)))
    }
    return adapter.replace(updates=kept), context


def of_attention(target: Target, update: ContextUpdate) -> bool:
    """Whether a context update belongs to a single attention module, not to the whole model."""
    return update.place in ("prefix", "attention") or (update.place == "past" and bool(target.path))


def _at_attention(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    prompts = [update for update in updates if update.place == "attention"]
    prefixes = [update for update in updates if update.place != "attention"]
    if prompts:
        with_prompts(target, prompts, building)
    if prefixes:
        with_prefixes(target, prefixes, building)


def _placed(update: object) -> bool:
    return isinstance(update, ContextUpdate) and update.place in PLACES


def place(context: Sequence[tuple[Target, ContextUpdate]], building: Building) -> str:
    """Attach prompts, new tokens and prefixes to a graph; return notes that tell the user how to use them.

    Args:
        context: the context updates with their targets, from `parted`.
        building: the model that is being changed.

    Raises:
        TargetNotFound: a target matches no attention module. Or a target does not match exactly one token embedding. Or
            the graph has no inputs for past keys and values.
        ShapeMismatch: the sizes of the context and the graph differ.
        Unsupported: there are several prefixes for the whole model.
    """
    rows: list[tuple[Target, Array]] = []
    pasts: list[tuple[Target, Array]] = []
    beside: dict[Target, list[ContextUpdate]] = {}
    for target, update in context:
        if of_attention(target, update):
            beside.setdefault(target, []).append(update)
            continue
        in_float64 = computed_over(update, _wide)
        if update.place == "past":
            pasts.append((target, _numbers(in_float64.past())))
        else:
            tokens = in_float64.embeddings() if update.place == "embeddings" else in_float64.vocabulary()
            rows.append((target, _numbers(tokens)))
    if len(pasts) > 1:
        raise Unsupported(
            "a graph can have only one prefix for the whole model, but the adapter has several",
            where=str(pasts[1][0]),
            cure="Inject an adapter that has only one of the prefixes",
        )
    notes = [_with_tokens(target, more, building) for target, more in rows[:1]] if len(rows) == 1 else []
    if len(rows) > 1:
        notes.append(_with_tokens(rows[0][0], np.concatenate([more for _, more in rows]), building))
    notes += [_with_past(target, past, building) for target, past in pasts]
    for target, updates in beside.items():
        _at_attention(target, updates, building)
    return "; ".join(notes)


def _wide(leaf: Leaf) -> Array:
    array: Array = as_array(leaf)
    return array if array.dtype.kind in "iu" else array.astype(np.float64)


def _numbers(tokens: object) -> Array:
    array: Array = np.asarray(tokens)
    return array


def _with_tokens(target: Target, more: Array, building: Building) -> str:
    """Add new tokens to an embedding, or to a module that contains embeddings.

    The vectors of the new tokens, `more`, are stored in a second table.
    """
    if _is_module(target, building.model):
        return with_tokens_behind(target, more, building)
    spot, branch = _embedding(target, building.model), Branch(building, f"adapterkit/{target or 'prompt'}")
    new = new_tokens(spot, more, target, branch)
    before([spot.node], new.ids, new.known, branch)
    behind(spot.node.outputs[0], new.instead_of(spot.node.outputs[0], branch), branch)
    branch.close()
    return new.ids_note


def _is_module(target: Target, model: ir.Model) -> bool:
    """Whether a target is a module that contains embeddings, not an embedding itself."""
    names = (
        name
        for spot in spots_of(model)
        if spot.kind is Gather
        for names_here in spot.names.values()
        for name in names_here
    )
    inside = any(target.path in modules_of(node) for node in model.graph)
    return bool(target.path) and inside and not any(same_end(n.removesuffix(".weight"), target.path) for n in names)


def _embedding(target: Target, model: ir.Model) -> Spot:
    """Return the embedding of the graph's input tokens. If the target has a path, the embedding must match the path."""
    spots = [spot for spot in spots_of(model) if spot.kind is Gather and read_by(spot.node) is not None]
    if target.path:
        names = [(spot, name) for spot in spots for names_here in spot.names.values() for name in names_here]
        spots = list(dict.fromkeys(s for s, name in names if same_end(name.removesuffix(".weight"), target.path)))
    elif len(spots) > 1:
        spots = [spot for spot in spots if "input_ids" in (read_by(spot.node) or "")]
    if len(spots) != 1:
        why = "no embedding of tokens matches the target" if not spots else "several embeddings match the target"
        raise TargetNotFound(why, where=str(target), cure="Use the name of the token embedding as the target")
    return spots[0]


def _with_past(target: Target, past: Array, building: Building) -> str:
    """Make a prefix the default value of the graph's inputs for past keys and values."""
    inputs = past_inputs(building.model.graph)
    layers, _, heads, length, width = past.shape
    if not inputs:
        cure = "Export the model with past keys and values (adapterkit export)"
        raise TargetNotFound("the graph has no inputs for past keys and values", where=str(target), cure=cure)
    for (layer, _), value in inputs.items():
        sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
        fits = len(sizes) == 4 and sizes[1] in (None, heads) and sizes[3] in (None, width)
        if not fits or layer >= layers or len(inputs) != 2 * layers:
            why = (
                f"the prefix has {layers} layers with {heads} heads of size {width}, "
                f"but the graph's past has {len(inputs) // 2} layers of shape {sizes}"
            )
            raise ShapeMismatch(why, where=value.name, cure=USE_ITS_BASE)
    for (layer, part), value in inputs.items():
        array = past[layer, ("key", "value").index(part)][None].astype(element_type(value))
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
        building.model.graph.register_initializer(value)
    return (
        "a run without past keys and values begins with the prefix; "
        f"include the prefix's {length} tokens in the attention mask and in the position ids"
    )
