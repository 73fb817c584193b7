"""Split a `MoE` node into separate nodes for each expert, so that a slot for an expert costs no more than other slots.

A `MoE` applies an activation between the two weights of an expert, so nodes after the `MoE` cannot add a change. Nodes
before it would compute the changed weights of all experts again in each call: with 32 experts of 512 x 512, this took
40 times as long as the `MoE` itself. After the split, each product with an expert's weight is a layer like any other. A
call computes only the experts that its tokens select, because each expert is in a branch of an If.

Each token selects k experts, which gives `tokens * k` pairs. The nodes sort the pairs by expert, so that each expert
processes all of its tokens at once:

    shares, chosen = top k of softmax(router)        # [tokens, k]
    order = argsort(chosen)                          # [tokens * k]
    rows = x[order // k]
    results = concat(If(count[e] > 0, expert_e(rows[start[e]:end[e]]), no rows) for e in experts)
    y = sum over k of shares * results[argsort(order)]

Up to rounding, the result equals the result of onnxruntime's CPU kernel:
https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/moe/moe_cpu.cc
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Malformed
from .building import Array, Attribute, Branch, Building, element_type, takes_over
from .experts import EXPERT, FUSED, Experts, SecondExperts, fused, path_of, stem_of
from .layers import Gemm, weight_at
from .operands import attribute, detached_copy, numbers, shape_of
from .values import SYMBOLS, Sizes, Value, concatenated

if TYPE_CHECKING:
    from .resolved import ResolvedTarget

ACTIVATIONS = ("relu", "gelu", "silu", "identity", "swiglu")
"""A `MoE` node can be split only if its `activation_type` is one of these."""


class ExpertGemm(Gemm):
    """A Gemm of a split `MoE`, which multiplies by the weight of one expert."""

    op_type = "Gemm"
    fused: ClassVar[bool] = False

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return EXPERT in node.metadata_props and is_fused(node) == cls.fused and super().takes(node)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    def unfolded(self, given: ir.Value, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        return given, end

    def _bias_after(self, out: ir.Value) -> None:
        return None  # The Gemm itself adds the bias; an Add after it belongs to the activation.


class FusedExpertGemm(ExpertGemm):
    """A Gemm of a split `MoE`, which multiplies by the fused gate and up projections of one expert.

    In the stored weight, rows of the gate projection and rows of the up projection alternate. Formulas get all rows of
    the gate projection first, and then all rows of the up projection.
    """

    fused = True

    @property
    def result(self) -> ir.Value:
        # After the Gemm, a Reshape, a Transpose and a second Reshape put all outputs of the gate projection before the
        # outputs of the up projection. Formulas need this order.
        out = self.node.outputs[0]
        for op in ("Reshape", "Transpose", "Reshape"):
            reader = next((use.node for use in out.uses() if use.node.op_type == op), None)
            if reader is None:
                why = "the Reshape and Transpose nodes that separate an expert's gate and up are missing"
                raise Malformed(
                    why, where=self.node.name, cure="Inject the adapter with --mode slots (mode='slots') again"
                )
            out = reader.outputs[0]
        return out

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        copy = detached_copy(cls.operand_of(node))
        return lambda: _apart(numbers(copy))

    @property
    def weight(self) -> Value:
        W = Value(self.branch, self.stored_shape(self.node), self.dtype, self.operand, lambda: numbers(self.operand))
        return _separated(W)

    @property
    def bias(self) -> Value | None:
        bias = self.constant_bias
        if bias is None:
            return None
        return _separated(Value(self.branch, shape_of(bias), self.dtype, bias, lambda: numbers(bias)))


GEMMS: tuple[type[ExpertGemm], ...] = (ExpertGemm, FusedExpertGemm)


def is_fused(node: ir.Node) -> bool:
    """Whether a Gemm of a split `MoE` multiplies by a weight that fuses gate and up."""
    return node.metadata_props.get(EXPERT, "").endswith(f".{FUSED}")


def _apart(stack: Array) -> Array:
    """Reorder alternating rows: first all rows of the gate projection, then all rows of the up projection."""
    return stack.reshape(-1, 2, *stack.shape[1:]).swapaxes(0, 1).reshape(stack.shape)


def _separated(W: Value) -> Value:
    """Reorder rows as `_apart` does, but with nodes in the graph."""
    return W.reshape(W.shape[0] // 2, 2, *W.shape[1:]).swapaxes(0, 1).reshape(*W.shape)


def with_split(places: Sequence[ResolvedTarget], building: Building) -> list[ResolvedTarget]:
    """Call `split` for each `MoE` node that contains a target, if `split` supports the node.

    Returns:
        the targets. A target in a split `MoE` refers to the new nodes that read its weight.
    """
    at = dict.fromkeys(spot.node for place in places for spot in place.spots if issubclass(spot.kind, Experts))
    turned = {spot.node for place in places if place.turned for spot in place.spots}
    sizes = {node: (Experts.sizes(node), fused(node)) for node in at if node not in turned and _can_split(node)}
    layers = {node: split(node, building) for node in sizes}

    def moved(place: ResolvedTarget) -> ResolvedTarget:
        first, rows = place.spots[0], place.target.rows
        assert issubclass(first.kind, Experts)
        assert rows is not None
        (_, out, hidden), parts = sizes[first.node]
        out = out if first.kind.first else hidden
        expert, start = divmod(rows[0], out)
        stop = rows[1] - expert * out
        kind: type[ExpertGemm] = FusedExpertGemm if first.kind.first and parts == 2 else ExpertGemm
        nodes = [layers[spot.node][first.kind.first, expert] for spot in place.spots]
        spots = tuple(replace(first, node=node, kind=kind, rows=None) for node in nodes)
        part = None if (start, stop) == (0, out) else (start, stop)
        return replace(place, target=replace(place.target, rows=part), spots=spots)

    return [moved(place) if any(spot.node in layers for spot in place.spots) else place for place in places]


def _can_split(node: ir.Node) -> bool:
    # Do not split a node with `use_sparse_mixer`. The CPU kernel and the split nodes ignore this attribute. Other
    # kernels use it, so their results would differ from the results of the split nodes.
    plain_routing = not attribute(node, "use_sparse_mixer", 0)
    return node.op_type == "MoE" and attribute(node, "activation_type", "relu") in ACTIVATIONS and plain_routing


def split(node: ir.Node, building: Building) -> dict[tuple[bool, int], ir.Node]:
    """Replace a `MoE` by nodes for each expert.

    Args:
        node: the `MoE`; its weights have the layout of `Experts`.
        building: the model that is being changed.

    Returns:
        a map from `(is_first, expert)` to a Gemm. `expert` is the expert's index. `is_first` is True for the Gemm that
        reads the expert's first weight, and False for the Gemm that reads the second weight.
    """
    graph, given, router = node.graph, node.inputs[0], node.inputs[1]
    assert graph is not None
    assert given is not None
    assert router is not None
    branch = Branch(building, node.name or f"{stem_of(node)}.moe")
    experts, _, hidden = Experts.sizes(node)
    k, dtype = int(attribute(node, "k", 1)), element_type(Experts.operand_of(node))

    x = Value(branch, None, dtype, given)
    whole = _sizes(x)
    x = _reshaped(x, [-1, hidden])
    odds = Value(branch, (None, experts), element_type(router), router).cast(np.float32)
    odds = odds.apply("Softmax", [odds], np.copy, odds.sizes, attributes={"axis": -1})
    # If several experts are equally likely, the kernel selects the last of them, but TopK selects the first. So reverse
    # the order of the experts. Equal probabilities are frequent, because padding tokens may be all zeros.
    odds = odds[:, list(range(experts))[::-1]]
    top = _top(odds, _whole_numbers(branch, [k]), (None, k), largest=True)
    shares = SYMBOLS.take_along_axis(odds, top, 1)
    if attribute(node, "normalize_routing_weights", 0):
        shares = shares / shares.sum(1, keepdims=True)
    chosen = _reshaped(experts - 1 - top, [-1])
    count = _sizes(chosen)
    order = _top(chosen, count, (None,), largest=False)
    rows = _gathered(x, order / k)
    counts = (chosen[:, None] == np.arange(experts)).cast(np.int64).sum(0)
    stops = counts.cumsum(0)
    starts, used = stops - counts, counts > 0

    nodes: dict[tuple[bool, int], ir.Node] = {}
    none = Value(branch, (0, hidden), dtype, None, lambda: np.zeros((0, hidden)))
    results = []
    for expert in range(experts):
        inside = Branch(building, f"{branch.name}/{expert}")
        limits = [Value(inside, one.sizes, one.dtype, one.value)[expert : expert + 1] for one in (starts, stops)]
        axis = building.literal(np.zeros(1, np.int64))
        mine = inside.node("Slice", [rows.value, *(one.value for one in limits), axis], None, dtype, None)
        y = _computed(node, expert, Value(inside, (None, hidden), dtype, mine), nodes)
        otherwise = Branch(building, f"{branch.name}/{expert}/unused")
        no_rows = otherwise.node("Identity", [none.value], None, dtype, (0, hidden))
        branches: dict[str, Attribute] = {
            "then_branch": _subgraph("then_branch", inside, y.value),
            "else_branch": _subgraph("else_branch", otherwise, no_rows),
        }
        out = branch.node("If", [_item(used, expert).value], branches, dtype, None)
        out.shape = ir.Shape((None, hidden))
        results.append(Value(branch, (None, hidden), dtype, out))
    back = _top(order, count, (None,), largest=False)
    y = _reshaped(_gathered(concatenated(results, 0), back).cast(np.float32), [-1, k, hidden])
    y = (y * shares[:, :, None]).sum(1).cast(dtype)
    # Without `allowzero`, Reshape replaces a size of 0 by the input's size. Opset 13 has no `allowzero`.
    zero: dict[str, Attribute] = {"allowzero": 1} if branch.opset >= 14 else {}
    y = y.apply("Reshape", [y, whole], np.reshape, None, attributes=zero)
    graph.insert_before(node, branch.nodes)
    takes_over(node.outputs[0], y.value, branch)
    graph.remove(node, safe=True)
    return nodes


def _computed(node: ir.Node, expert: int, x: Value, nodes: dict[tuple[bool, int], ir.Node]) -> Value:
    """Compute the output of one expert for the rows `x`, and add the expert's two Gemms to `nodes`."""
    stem, kind = stem_of(node), attribute(node, "activation_type", "relu")
    assert stem is not None

    def product(x: Value, weights: type[Experts], name: str) -> Value:
        vector = weights.vector or 0
        stacks = (weight_at(node, weights.position), *node.inputs[vector : vector + 1])
        # The expert's index is a constant, so onnxruntime selects the weights only once, when a session starts.
        taken = [_item(Value(x.branch, shape_of(one), x.dtype, one), expert) for one in stacks if one is not None]
        out = x.branch.node("Gemm", [x.value, *(one.value for one in taken)], {"transB": 1}, x.dtype, None)
        gemm = x.branch.nodes[-1]
        gemm.metadata_props[EXPERT] = path_of(stem, expert, name)
        nodes[weights.first, expert] = gemm
        out.shape = ir.Shape((None, taken[0].shape[0]))
        return Value(x.branch, (None, taken[0].shape[0]), x.dtype, out)

    h = product(x, Experts, FUSED if fused(node) == 2 else "up_proj")
    if kind == "swiglu":
        inner = h.shape[1] // 2
        h = _reshaped(_reshaped(h, [-1, inner, 2]).swapaxes(1, 2), [-1, 2 * inner])
    # Compute the activation in float32 even if the graph is float16, as the kernel does.
    return product(_activated(node, kind, h.cast(np.float32)).cast(x.dtype), SecondExperts, "down_proj")


def _activated(node: ir.Node, kind: str, h: Value) -> Value:
    if kind == "relu":
        return h.apply("Relu", [h], lambda a: np.maximum(a, 0), h.sizes)
    if kind == "gelu":
        return 0.5 * h * (1 + SYMBOLS.tanh(0.7978845608 * (h + 0.044715 * h * h * h)))
    if kind == "silu":
        return h * _sigmoid(h)
    if kind == "identity":
        return h
    alpha, beta = attribute(node, "activation_alpha", 1.0), attribute(node, "activation_beta", 0.0)
    limit, inner = attribute(node, "swiglu_limit", math.inf), h.shape[1] // 2
    gate, up = h[:, :inner], h[:, inner:]
    if math.isfinite(limit):
        gate, up = SYMBOLS.clip(gate, None, limit), SYMBOLS.clip(up, -limit, limit)
    return gate * _sigmoid(alpha * gate) * (up + beta)


def _sigmoid(x: Value) -> Value:
    return x.apply("Sigmoid", [x], lambda a: 1 / (1 + np.exp(-a)), x.sizes)


def _top(x: Value, count: Value, sizes: Sizes, largest: bool) -> Value:
    """Return the indices of the `count` largest or smallest values on the last axis, in order of their values.

    Equal values keep their order.
    """
    words = {"axis": -1, "largest": int(largest)}
    node = x.branch.node("TopK", [x.value, count.value], words, np.int64, None, position=1)
    return Value(x.branch, sizes, np.int64, node)


def _sizes(x: Value) -> Value:
    return Value(x.branch, (None,), np.int64, x.branch.node("Shape", [x.value], None, np.int64, None))


def _gathered(x: Value, positions: Value) -> Value:
    node = x.branch.node("Gather", [x.value, positions.value], {"axis": 0}, x.dtype, None)
    return Value(x.branch, (None, *x.shape[1:]), x.dtype, node)


def _reshaped(x: Value, shape: Sequence[int]) -> Value:
    """Reshape a value whose number of rows is dynamic, and may be 0."""
    node = x.branch.node("Reshape", [x.value, _whole_numbers(x.branch, shape).value], None, x.dtype, None)
    return Value(x.branch, tuple(None if size == -1 else size for size in shape), x.dtype, node)


def _whole_numbers(branch: Branch, array: Sequence[int]) -> Value:
    literal = branch.building.literal(np.array(array, np.int64))
    return Value(branch, (len(array),), np.int64, literal)


def _subgraph(name: str, branch: Branch, out: ir.Value) -> ir.Attr:
    return ir.AttrGraph(
        name, ir.Graph([], [out], nodes=branch.nodes, name=branch.building.name(f"{branch.name}/graph"))
    )


def _item(stack: Value, number: int) -> Value:
    """Return the entry with the index `number` along the first axis."""
    index = stack.branch.building.literal(np.array(number, np.int64))
    node = stack.branch.node("Gather", [stack.value, index], {"axis": 0}, stack.dtype, stack.shape[1:])
    return Value(stack.branch, stack.shape[1:], stack.dtype, node)
