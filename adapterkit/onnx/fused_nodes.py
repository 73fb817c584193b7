"""Layers inside nodes that onnxruntime fused: an attention with its projections, or a Gemm or Conv with its activation.

When onnxruntime optimizes a graph and saves it, one node of the domain `com.microsoft` may replace a layer and the
nodes around it. An Attention node computes the query, key and value projections and the attention. Its weight
`[in, q | k | v]` packs the three projections. A merge changes that weight. Before an adapter is attached, the node is
split into a MatMul, an Add of the bias and a MultiHeadAttention. A FusedGemm or FusedConv stays whole, because nodes
before it can compute the changed weight; see inside.py.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Branch, Building, Dtype, element_type, takes_over
from .layers import Conv, Gemm, GraphLayer, weight_at
from .operands import attribute, is_constant, shape_of

KEPT = ("num_heads", "scale", "mask_filter_value", "unidirectional")
"""The attributes that `taken_apart` copies from an Attention to the MultiHeadAttention that replaces it."""


class Attention(GraphLayer):
    """The query, key and value projections of a fused attention node, which stores all three as one weight."""

    op_type = "Attention"
    vector: ClassVar[int | None] = 2

    def _bias_after(self, out: ir.Value) -> None:
        return None

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        known = node.op_type == cls.op_type and node.domain == "com.microsoft" and len(node.inputs) > 1
        return known and is_constant(node.inputs[1])


class FusedGemm(Gemm):
    """A Gemm with a fused activation, as in graphs that onnxruntime optimized and saved."""

    op_type = "FusedGemm"
    inside = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return _is_fused(node, cls)


class FusedConv(Conv):
    """A Conv with a fused sum and activation, as in graphs that onnxruntime optimized and saved."""

    op_type = "FusedConv"
    inside = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return _is_fused(node, cls)


def _is_fused(node: ir.Node, kind: type[GraphLayer]) -> bool:
    known = node.op_type == kind.op_type and node.domain == "com.microsoft" and len(node.inputs) > 1
    weight = weight_at(node, 1) if known else None
    return weight is not None and is_constant(weight) and len(shape_of(weight)) in kind.axes


def taken_apart(node: ir.Node, building: Building) -> ir.Node:
    """Split an Attention node into several nodes; return the MatMul among them.

    Raises:
        Unsupported: the node has a past or a position bias, or applies rotary embeddings.
    """
    packed = node.op_type == "QAttention"
    more = [*(node.inputs[8:] if packed else node.inputs[4:]), *[o for o in node.outputs[1:] if o.uses()]]
    more = [one for one in more if one is not None]
    if more or attribute(node, "do_rotary", 0) != 0:
        why = "this Attention node cannot be split: it has a past, a position bias or rotary embeddings"
        cure = "Merge the adapter instead, or inject it into the graph before the graph is optimized"
        raise Unsupported(why, where=node.name, cure=cure)
    x, W, bias, mask = (*node.inputs, None, None)[:4]
    mask = (*node.inputs, None)[5] if packed else mask
    assert x is not None
    assert W is not None
    third = shape_of(W)[1] // 3
    # By default, queries, keys and values have equal sizes.
    ends = [int(end) for end in np.cumsum(attribute(node, "qkv_hidden_sizes", None) or [third] * 3)]
    branch, kind = Branch(building, node.name or "attention"), np.dtype(np.float32) if packed else element_type(W)
    if packed:  # MatMulIntegerToFloat reads scales and zero points in another order.
        order = [x, W, *((*node.inputs, *[None] * 5)[at] for at in (3, 4, 6, 7)), bias]
        y = branch.node("MatMulIntegerToFloat", order, None, kind, None, domain="com.microsoft")
    else:
        y = branch.node("MatMul", [x, W], None, kind, None)
        y = y if bias is None else branch.node("Add", [y, bias], None, kind, None)
    parts = [_cut(branch, y, start, stop, kind) for start, stop in zip((0, *ends[:2]), ends, strict=True)]
    out = ir.Value(name=building.name(f"{branch.name}/output"), type=node.outputs[0].type)
    words = {name: node.attributes[name].value for name in KEPT if name in node.attributes}
    whole = ir.node("MultiHeadAttention", [*parts, None, mask], words, outputs=[out], domain="com.microsoft")
    whole.name = building.name(f"{branch.name}/MultiHeadAttention")
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, [*branch.nodes, whole])
    branch.nodes[0].metadata_props.update(node.metadata_props)
    takes_over(node.outputs[0], out, branch)
    graph.remove(node, safe=True)
    return branch.nodes[0]


def _cut(branch: Branch, y: ir.Value, start: int, stop: int, kind: Dtype) -> ir.Value:
    limits = [branch.building.literal(np.array([number], dtype=np.int64)) for number in (start, stop, -1)]
    return branch.node("Slice", [y, *limits], None, kind, None)
