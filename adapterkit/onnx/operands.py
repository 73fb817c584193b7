"""Find operands that do not depend on the model's inputs, and compute their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import onnx_ir as ir

from ..errors import Malformed, first_line
from .building import Array

THROUGH = frozenset(
    {"Transpose", "Identity", "Cast", "DequantizeLinear", "Mul", "Sub", "Add", "Reshape", "Squeeze", "Unsqueeze",
     "Constant", "ConstantOfShape", "QuantizeLinear", "Concat", "Slice", "Gather"}
)  # fmt: skip
"""Operators that may compute a constant operand from stored tensors."""

DEEP = 16
"""An operand counts as constant only if fewer than `DEEP` nodes are between it and each stored tensor. The limit exists
because the chain of nodes in an untrusted graph may have any length."""


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the main graph and of its subgraphs.

    Nodes in ONNX functions are omitted, because a change of a function would affect all of its calls.
    """
    yield from model.graph.all_nodes()


def input_at(node: ir.Node, position: int | None) -> ir.Value | None:
    """Return an input of a node; None if the node has no input at this position, or if the position is None."""
    return node.inputs[position] if position is not None and position < len(node.inputs) else None


def is_constant(value: ir.Value | None, depth: int = DEEP) -> bool:
    """Whether a value is computed only from stored tensors, by fewer than `depth` successive operators of `THROUGH`."""
    if value is None or depth == 0:
        return False
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None or node.op_type not in THROUGH or node.domain not in ("", "ai.onnx"):
        return False
    return all(one is None or is_constant(one, depth - 1) for one in node.inputs)


def sources(value: ir.Value) -> list[ir.Value]:
    """Return the stored tensors that a constant value is computed from."""
    node = value.producer()
    if value.const_value is not None or node is None or not any(node.inputs):
        return [value]
    return list(dict.fromkeys(s for one in node.inputs if one is not None for s in sources(one)))


def numbers(value: ir.Value) -> Array:
    """Return a constant value as an array, computed by ONNX's reference implementation.

    Raises:
        Malformed: the nodes that compute the value have invalid inputs.
    """
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None
    given = [None if one is None else numbers(one) for one in node.inputs]
    try:
        # Compute two common operators here, because the reference implementation would copy the array.
        if node.op_type == "Identity":
            return _some(given[0])
        if node.op_type == "Transpose":
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            return _some(given[0]).transpose(order)
        return _run(node, given)
    except Exception as error:  # The reference implementation raises any type of error.
        why = f"the constant value {value.name!r} cannot be computed ({first_line(error)})"
        raise Malformed(why, where=node.name, cure="Export the model again") from None


def detached_copy(value: ir.Value) -> ir.Value:
    """Copy a constant value and the nodes that compute it; later changes of the graph do not affect the copy."""
    node = value.producer()
    if value.const_value is not None or node is None:
        return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
    given = [None if one is None else detached_copy(one) for one in node.inputs]
    words = {name: attribute_.value for name, attribute_ in node.attributes.items()}
    out = ir.Value(name=value.name, shape=value.shape, type=value.type)
    ir.node(node.op_type, given, words, outputs=[out], domain=node.domain)
    return out


def input_behind(value: ir.Value | None) -> ir.Value | None:
    """Return the graph input that a value equals apart from casts and reshapes; None if there is no such input."""
    while (
        value is not None and (node := value.producer()) is not None and node.op_type in ("Cast", "Identity", "Reshape")
    ):
        value = node.inputs[0]
    return value if value is not None and value.is_graph_input() else None


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a constant value; compute the value only if the graph does not give the shape."""
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value.shape is not None and all(isinstance(size, int) for size in value.shape):
        return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
    node = value.producer()
    if node is not None and node.op_type in ("Identity", "Cast", "DequantizeLinear") and node.inputs[0] is not None:
        return shape_of(node.inputs[0])
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        inner = shape_of(node.inputs[0])
        order = list(attribute(node, "perm", range(len(inner))[::-1]))
        if sorted(order) != list(range(len(inner))):
            why = f"a Transpose has the invalid order {order} for {len(inner)} axes"
            raise Malformed(why, where=node.name, cure="Export the model again")
        return tuple(inner[axis] for axis in order)
    return tuple(numbers(value).shape)


Default = TypeVar("Default")


@overload
def attribute(node: ir.Node, name: str, default: None) -> Sequence[int] | None: ...


@overload
def attribute(node: ir.Node, name: str, default: Default) -> Default: ...


def attribute(node: ir.Node, name: str, default: object) -> object:
    """Return a node's attribute, or `default` if the node lacks the attribute.

    With a default of None, the attribute's type is not checked, but the result is annotated as `Sequence[int] | None`.
    So pass None only for attributes that are lists of integers.

    Raises:
        Malformed: the attribute and a default other than None have different types.
    """
    entry = node.attributes.get(name)
    if entry is None:
        return default
    kind = Sequence if isinstance(default, Sequence) else type(default)
    if default is not None and not isinstance(entry.value, kind):
        why = f"the attribute {name} of a {node.op_type} has the wrong type"
        raise Malformed(why, where=node.name, cure="Export the model again")
    return entry.value


def _some(array: Array | None) -> Array:
    assert array is not None
    return array


def _run(node: ir.Node, given: list[Array | None]) -> Array:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [f"in_{n}" if array is not None else "" for n, array in enumerate(given)]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.append("out")
    feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
    inputs = [
        helper.make_tensor_value_info(name, int(ir.DataType.from_numpy(array.dtype)), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph([proto], "constant", inputs, [helper.make_empty_tensor_value_info("out")])
    # Use opset 21, because the reference implementation has no DequantizeLinear before opset 19. The operators in
    # `THROUGH` mean the same in opsets 13 to 21.
    opset = max(node.graph.opset_imports.get("", 21), 21) if isinstance(node.graph, ir.Graph) else 21
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    result: Array = np.asarray(results[0])
    return result
