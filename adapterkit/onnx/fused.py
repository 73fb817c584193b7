"""onnxruntime's fused attention: one weight `[in, q | k | v]` in a node that computes the whole attention.

A merge changes that weight in place. For a branch, the node is split into a MatMul, an Add of its bias and a
MultiHeadAttention.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Branch, Building, element_type
from .convolutions import Conv
from .inserting import takes_over
from .layers import Gemm, Layer
from .operands import attribute, is_constant, shape_of

KEPT = ("num_heads", "scale", "mask_filter_value", "unidirectional")
"""Attributes that both operators have."""


class Attention(Layer):
    """The projections to queries, keys and values, which are rows of one weight."""

    op_type = "Attention"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        known = node.op_type == cls.op_type and node.domain == "com.microsoft" and len(node.inputs) > 1
        return known and is_constant(node.inputs[1])

    @property
    def own_bias(self) -> ir.Value | None:
        held = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        return held if is_constant(held) else None


class FusedGemm(Gemm):
    """A Gemm with a fused activation, as in saved optimized sessions."""

    # A branch would have to be added before the activation, which is inside of the node. A merge changes W only.

    op_type = "FusedGemm"
    merge_only = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return _is_fused(node, cls)


class FusedConv(Conv):
    """A Conv with a fused sum and activation."""

    op_type = "FusedConv"
    merge_only = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return _is_fused(node, cls)


def _is_fused(node: ir.Node, kind: type[Layer]) -> bool:
    known = node.op_type == kind.op_type and node.domain == "com.microsoft" and len(node.inputs) > 1
    return known and is_constant(node.inputs[1]) and len(shape_of(node.inputs[1])) in kind.axes  # type: ignore[arg-type]


def taken_apart(node: ir.Node, building: Building) -> ir.Node:
    """Replace the node by several; return the MatMul among them.

    Raises:
        Unsupported: it has a past or a position bias, or applies rotary embeddings.
    """
    more = [one for one in (*node.inputs[4:], *[o for o in node.outputs[1:] if o.uses()]) if one is not None]
    if more or attribute(node, "do_rotary", 0):
        why = "an Attention node with a past or positions of its own"
        raise Unsupported(why, where=node.name, cure="Merge it instead, or inject before the graph is optimised")
    x, W, bias, mask = (*node.inputs, None, None)[:4]
    assert x is not None
    assert W is not None
    third = shape_of(W)[1] // 3
    # Without the attribute, queries, keys and values have equal sizes.
    ends = np.cumsum(attribute(node, "qkv_hidden_sizes", None) or [third] * 3)
    branch, kind = Branch(building, node.name or "attention"), element_type(W)
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


def _cut(branch: Branch, y: ir.Value, start: int, stop: int, kind: object) -> ir.Value:
    limits = [branch.building.literal(np.array([number], dtype=np.int64)) for number in (start, stop, -1)]
    return branch.node("Slice", [y, *limits], None, kind, None)
