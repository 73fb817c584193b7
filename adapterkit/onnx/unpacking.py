"""Convert packed layers to floating point, so that a merge can change them; and the choices for packed weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..merging.quantized import WHY
from .building import Branch, Building
from .inserting import takes_over
from .layers import Layer, MatMul, dequantized
from .operands import shape_of
from .packed import MatMulInteger, MatMulNBits
from .resolving import Spot

CHOICES = {choice: WHY[choice] for choice in ("dequantize", "requantize")}
"""Choices of a merge for a packed weight -> their meaning."""

EXPLAINED = (
    "Inject instead of merging, which leaves the weight as it is; or choose: (1) quantized='dequantize' "
    "(--quantized dequantize): fold into the dequantized weight and write a layer of floating point; (2) "
    "quantized='requantize' (--quantized requantize): quantize the result again in the same scheme, which rounds the "
    "change as coarsely as the weight and says how much of it is left"
)

PACKED = re.compile(r"(?:_quantized|_q|(?:_DQ)?_Q\d)$")
"""Suffixes that quantizers append to the name of a weight."""


def is_packed(spot: Spot) -> bool:
    """Whether a layer's weight is stored as integers."""
    kinds = [(one.const_value or one, one) for one in spot.sources]
    return any(
        held.dtype is not None and not held.dtype.is_floating_point() and len(shape_of(one)) > 1 for held, one in kinds
    )


def as_float(spot: Spot, building: Building, made: dict[Any, ir.Value]) -> Spot:
    """Convert a packed layer to floating point, including its input and output; return the new layer."""
    layer = spot.kind(spot.node, Branch(building, "dequantize"))
    whole = isinstance(layer, MatMulNBits | MatMulInteger)
    value = _unpacked(spot, layer, whole, building, made)
    node = _plain_node(layer, value) if whole else _plain_operands(spot, layer, value)
    kind: type[Layer] = MatMul if whole else spot.kind
    first, second, *rest = shape_of(value)
    shape = (second, first, *rest) if kind.turns(node) else (first, second, *rest)
    return replace(spot, node=node, kind=kind, sources=(value,), shape=shape)


def _plain_operands(spot: Spot, layer: Layer, value: ir.Value) -> ir.Node:
    """Return the node with its weight, input and output no longer quantized and dequantized."""
    node, other = spot.node, 1 - spot.kind.position
    before = [one.producer() for one in node.inputs[:2] if one is not None]
    node.replace_input_with(other, layer.read)
    node.replace_input_with(spot.kind.position, value)
    for one in before:
        drop(one)
    ends = [layer.result] if layer.after is None else [layer.result, layer.after[0].outputs[0]]
    for out in ends:
        _replaced(dequantized(out), out, layer.branch)
    return node


def _unpacked(spot: Spot, layer: Layer, whole: bool, building: Building, made: dict[Any, ir.Value]) -> ir.Value:
    """Return the dequantized weight, one initializer per packed one; computed when it is written."""
    operand = layer.operand
    key = (id(operand), *(id(one) for one in spot.node.inputs[2:4])) if whole else id(operand)
    if key not in made:
        make, kind = spot.kind.detached(spot.node), ir.DataType.from_numpy(layer.dtype)
        shape, turn = spot.kind.held_shape(spot.node), whole and not spot.kind.turns(spot.node)
        name = building.name(PACKED.sub("", spot.sources[0].name or "weight"))
        sizes = ir.Shape(shape[::-1] if turn else shape)

        def worked_out() -> ir.TensorProtocol:
            W = np.asarray(make()).astype(kind.numpy(), copy=False)
            return ir.Tensor(np.ascontiguousarray(W.T if turn else W), dtype=kind, name=name)

        tensor = ir.LazyTensor(worked_out, kind, sizes, cache=False, name=name)
        made[key] = ir.Value(name=name, shape=sizes, type=ir.TensorType(kind), const_value=tensor)
        building.model.graph.register_initializer(made[key])
        # Keep the operand alive, so that no other object gets its id.
        building.keep(operand)
    return made[key]


def _plain_node(layer: Layer, value: ir.Value) -> ir.Node:
    """Replace a node that computes with packed weights by a MatMul, and an Add if it had a bias."""
    branch, graph, last = layer.branch, layer.node.graph, layer.result.producer()
    assert graph is not None
    assert last is not None
    y = branch.node("MatMul", [layer.read, value], None, layer.dtype, None)
    node = branch.nodes[0]
    if layer.own_bias is not None:
        y = branch.node("Add", [y, layer.own_bias], None, layer.dtype, None)
    graph.insert_after(last, branch.nodes)
    node.metadata_props.update(layer.node.metadata_props)
    _replaced(layer.result, y, branch)
    node.name = layer.node.name
    return node


def _replaced(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Replace all uses of `old` with `new`, and remove the nodes that are left unused."""
    if old is new:
        return
    takes_over(old, new, branch)
    drop(old.producer())


def drop(node: ir.Node | None) -> None:
    """Remove a node that nothing reads, and the nodes before it that served only that one."""
    if node is None or node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    before = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for one in before:
        drop(one)
