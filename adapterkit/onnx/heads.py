"""Find the queries, keys and values in a layer that packs them, such as `qkv_proj` in graphs of onnxruntime-genai.

An adapter has separate targets `q_proj`, `k_proj` and `v_proj`. If an attention node reads the layer's output, the
number of rows of each target is computed from the node's head counts. If a Split node reads the output, the numbers are
the sizes of the Split. So no size is guessed, and the base's weights are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..naming.binding.moving import cut_rows
from .operands import attribute, is_constant, numbers

if TYPE_CHECKING:
    from ..core.updates import Update
    from .resolved import Spot

PARTS = ("q_proj", "k_proj", "v_proj")

FUSED = {"qkv_proj": PARTS, "gate_up_proj": ("gate_proj", "up_proj")}
"""A map from the last segment of a fused layer's name in Phi-3 to the names of separate layers. onnxruntime-genai's
model builder splits the fused layer into these layers. Their names are in the order of the fused layer's rows."""

PACKED = "qkv_proj"
"""The model builder's name for the layer that packs `PARTS`."""


def in_parts(adapter: Adapter, rows_of: Callable[[str], int | None]) -> tuple[Adapter, dict[Target, Target]]:
    """Split the updates of each fused layer that the graph stores as several separate layers; see `FUSED`.

    Args:
        adapter: the adapter.
        rows_of: a function that takes the path of a layer in the graph, and returns the layer's number of rows; None if
            the graph has no such layer.

    Returns:
        the adapter with split updates, and a map from each new target to the target that was split.
    """
    whole: dict[Target, Target] = {}
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, group in adapter.updates.items():
        stem, _, word = target.path.rpartition(".")
        sizes = [rows_of(f"{stem}.{part}") for part in FUSED.get(word, ())]
        plain = target.rows is None and not target.stacked
        plain = plain and all(update.kind != "output" and update.cuts("out") for update in group)
        if not sizes or None in sizes or not plain or rows_of(target.path) is not None:
            updates[target] = group
            continue
        start = 0
        for part, size in zip(FUSED[word], sizes, strict=True):
            assert size is not None
            part_target = replace(target, path=f"{stem}.{part}")
            whole[part_target] = target
            updates[part_target] = tuple(cut_rows(update, start, start + size, 1, False) for update in group)
            start += size
    return (adapter.replace(updates=updates) if whole else adapter), whole


def in_packed(target: Target, names: Collection[str]) -> Target:
    """Convert a target for queries, keys or values to a target for their rows in the packed layer.

    Any other target is returned unchanged. A graph with slots at the packed layer needs this conversion: the slots'
    nodes are between the layer and its attention node, so `in_heads` does not find the queries, keys and values.

    Args:
        target: the target, with its name in the graph's list of slots. Its rows are counted from the first row of the
            packed layer.
        names: the names of the weights in the graph.
    """
    stem, _, word = target.path.rpartition(".")
    alone = word not in PARTS or target.rows is None or f"{target.path}.weight" in names
    whole = replace(target, path=f"{stem}.{PACKED}")
    return target if alone or f"{whole.path}.weight" not in names else whole


BETWEEN = {
    "Reshape", "SimplifiedLayerNormalization", "LayerNormalization", "RotaryEmbedding", "Cast", "Transpose", "Identity",
}  # fmt: skip
"""Operators that may be between one part of a packed layer and the attention node. None of them mixes the parts."""

DEEP = 8
"""The search for the attention node starts at an output of a packed layer's Split and visits up to this many nodes."""


def in_heads(spots: Sequence[Spot]) -> list[Spot]:
    """Return three spots for each packed layer: one for the queries, one for the keys and one for the values.

    Other layers, and packed layers whose parts cannot be found, have no spots in the result.
    """
    return [part for spot in spots for part in _parts(spot)]


def _parts(spot: Spot) -> Iterator[Spot]:
    names = [name for part_names in spot.names.values() for name in part_names if f".{PACKED}." in f".{name}"]
    sizes = _sizes(spot.node.outputs[0], spot.shape[0]) if names and len(spot.shape) == 2 else None
    if sizes is None:
        return
    start = 0
    for word, size in zip(PARTS, sizes, strict=True):
        part_names = tuple(dict.fromkeys(name.replace(PACKED, word) for name in names))
        yield replace(
            spot, names={"heads": part_names}, rows=(start, start + size), shape=(size, spot.shape[1])
        )  # fmt: skip
        start += size


def _sizes(value: ir.Value, rows: int) -> tuple[int, int, int] | None:
    """Return how many rows are queries, keys and values; None if no attention node or Split gives these numbers."""
    node = _reader(value)
    if node is not None and node.op_type == "Add" and any(is_constant(one) for one in node.inputs):
        value = node.outputs[0]  # Skip the bias.
        node = _reader(value)
    if node is None:
        return None
    if node.op_type == "GroupQueryAttention":
        heads, shared = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
        alone = node.inputs[0] is value and not any(one is not None for one in node.inputs[1:3])
        each, rest = divmod(rows, heads + 2 * shared) if heads and shared else (0, 1)
        return (heads * each, shared * each, shared * each) if alone and not rest else None
    if node.op_type == "Split" and len(node.outputs) == 3 and len(node.inputs) > 1 and is_constant(node.inputs[1]):
        sizes = [int(size) for size in numbers(node.inputs[1])]  # type: ignore[arg-type]
        last = attribute(node, "axis", 0) in (-1, 2)
        if last and sum(sizes) == rows and all(_is_read_as(out, at) for at, out in enumerate(node.outputs)):
            return sizes[0], sizes[1], sizes[2]
    return None


def _is_read_as(value: ir.Value, position: int) -> bool:
    """Whether an attention node reads `value` as its queries (position 0), keys (1) or values (2)."""
    for _ in range(DEEP):
        node = _reader(value)
        if node is None:
            return False
        if node.op_type in ("GroupQueryAttention", "MultiHeadAttention"):
            return node.inputs[position] is value
        if node.op_type not in BETWEEN or node.inputs[0] is not value:
            return False
        value = node.outputs[0]
    return False


def _reader(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value; None if there is no such node, or if the graph outputs the value."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
