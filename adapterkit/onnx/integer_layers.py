"""Layers of integer operators. Formulas see the weights, inputs and outputs of these layers as floats.

An adapter's nodes compute in floats. They read the dequantized input of the operator, and their result is added to the
dequantized output. The operator itself stays, so that a graph with empty slots computes the same integers as before.
Only operators that may include a Relu are replaced; see `opened_up`.
https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .building import Array, Branch, Building, Dtype, takes_over
from .fused_nodes import Attention
from .layers import Conv, GraphLayer, MatMul, only_reader, rectifies
from .operands import attribute, detached_copy, input_at, is_constant, numbers, shape_of
from .resolved import ResolvedTarget, Spot
from .values import Value

MICROSOFT = "com.microsoft"


class IntegerLayer(GraphLayer):
    """A node that reads an integer weight, the weight's scale and its zero point.

    Class attributes:
        domain: the operator's domain.
        parts: the positions of the weight, its scale and its zero point among the node's inputs.
        origin: the positions of the layer's input, its scale and its zero point among the node's inputs. If the layer's
            input is in floats, `origin` has only the position of the input.
        out: the positions of the output's scale and zero point among the node's inputs; None if the output is in
            floats.
        floating: the layer class of the equivalent float operator.
    """

    domain: ClassVar[str] = ""
    parts: ClassVar[tuple[int, int, int]]
    origin: ClassVar[tuple[int, ...]] = (0, 1, 2)
    out: ClassVar[tuple[int, int] | None] = None
    floating: ClassVar[type[GraphLayer]] = MatMul

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        domain = "" if node.domain == "ai.onnx" else node.domain
        last = max(*cls.parts[:2], cls.origin[0])
        if (node.op_type, domain) != (cls.op_type, cls.domain) or len(node.inputs) <= last:
            return False
        weight, scale = node.inputs[cls.parts[0]], node.inputs[cls.parts[1]]
        operands = [weight, scale, input_at(node, cls.parts[2])]
        # With static quantization, the scales and zero points of the input and output must be constants, too.
        if cls.out is not None:
            operands += [input_at(node, position) for position in (*cls.origin[1:], *cls.out)]
        if weight is None or scale is None or not all(one is None or is_constant(one) for one in operands):
            return False
        return len(shape_of(weight)) in cls.axes

    @classmethod
    def axis(cls, node: ir.Node) -> int:
        """Return the axis of the stored weight that holds the output channels; each channel may have its own scale."""
        return len(cls.stored_shape(node)) - 1 if cls.turns(node) else 0

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        copies = [None if one is None else detached_copy(one) for one in cls.stored(node)]
        axis, axes = cls.axis(node), len(cls.stored_shape(node))

        def make() -> Array:
            q, scale, zero = (None if one is None else numbers(one).astype(np.float32) for one in copies)
            assert q is not None
            assert scale is not None
            W: Array = (q - (0 if zero is None else _along(zero, axis, axes))) * _along(scale, axis, axes)
            return W

        return make

    @classmethod
    def stored(cls, node: ir.Node) -> list[ir.Value | None]:
        """Return the integer weight, its scale and its zero point."""
        return [input_at(node, position) for position in cls.parts]

    @classmethod
    def float_bias(cls, node: ir.Node) -> ir.Value | None:
        """Return the bias that the node adds, as floats; None if it has no constant bias."""
        bias = None if cls.vector is None else input_at(node, cls.vector)
        if bias is None or not is_constant(bias):
            return None
        b = numbers(bias)
        if b.dtype.kind in "iu":
            b = b * (_scale(node, cls.origin[1]) * _scale(node, cls.parts[1])).reshape(-1)
        tensor = ir.Tensor(np.ascontiguousarray(b.reshape(-1).astype(np.float32)), name=bias.name)
        return ir.Value(name=bias.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

    def put(self, arrays: Sequence[ir.Value]) -> None:
        """Replace the node's weight, scale and zero point; requantize an integer bias for the new scale."""
        vector = None if self.vector is None else input_at(self.node, self.vector)
        b = None if vector is None else numbers(vector)
        before = None if b is None else _scale(self.node, self.parts[1])
        for position, value in zip(self.parts, arrays, strict=False):
            self.node.replace_input_with(position, value)
        if b is None or before is None or b.dtype.kind not in "iu" or self.vector is None:
            return
        # The scale of an integer bias is the input's scale times the weight's scale. The weight's scale has changed.
        again = np.rint(b.astype(np.float64) * before.reshape(-1) / _scale(self.node, self.parts[1]).reshape(-1))
        name = f"{vector.name}.merged"  # type: ignore[union-attr]
        self.node.replace_input_with(self.vector, initializer(self.branch.building, name, again.astype(b.dtype)))

    def in_floats(self, W: ir.Value, x: ir.Value | None = None) -> ir.Value:
        """Append nodes that compute this layer in floating point; return their output.

        Args:
            W: the weight, in the axis order of `floating`.
            x: the input; by default, the node's input before it is quantized.
        """
        bias, node = self.float_bias(self.node), self.node
        x = x or self.read
        b = None if bias is None else initializer(self.branch.building, f"{bias.name}.float", numbers(bias))
        if issubclass(self.floating, Conv):
            words = {name: one.value for name, one in node.attributes.items()}
            return self.branch.node("Conv", [x, W, b], words, self.dtype, None)
        if issubclass(self.floating, Attention):
            words = {name: one.value for name, one in node.attributes.items()}
            inputs = [x, W, b, input_at(node, 5), input_at(node, 8)]
            return self.branch.node("Attention", inputs, words, self.dtype, None, domain=MICROSOFT)
        y = self.branch.node("MatMul", [x, W], None, self.dtype, None)
        return y if b is None else self.branch.node("Add", [y, b], None, self.dtype, None)

    @property
    def constant_bias(self) -> ir.Value | None:
        # The node may store the bias as integers. Formulas need floats, which `bias` returns.
        return None

    @property
    def bias(self) -> Value | None:
        bias = None if self.apart else self.float_bias(self.node)
        if bias is None:
            return super().bias
        return Value(self.branch, shape_of(bias), self.dtype, None, lambda: numbers(bias))

    @property
    def read(self) -> ir.Value:
        float_value = float_input(self.node, self.origin)
        assert float_value is not None  # `opened_up` adds a DequantizeLinear if the graph has no float value.
        return float_value

    @property
    def result(self) -> ir.Value:
        out = self.node.outputs[0]
        if self.out is None or input_at(self.node, self.out[0]) is None:
            return out
        back = only_reader(out, "DequantizeLinear")
        assert back is not None  # `opened_up` adds a DequantizeLinear if the graph has none.
        return back.outputs[0]

    @property
    def dtype(self) -> Dtype:
        return np.dtype(np.float32)


class QLinearMatMul(IntegerLayer):
    """A product of integer matrices, written by static quantization."""

    op_type = "QLinearMatMul"
    position, parts, out = 3, (3, 4, 5), (6, 7)


class QGemm(IntegerLayer):
    """A `QLinearMatMul` for inputs of two axes, with an integer bias."""

    op_type, domain = "QGemm", MICROSOFT
    position, parts, out, vector = 3, (3, 4, 5), (7, 8), 6

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = super().takes(node) and attribute(node, "alpha", 1.0) == 1.0
        return plain and not attribute(node, "transA", 0)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return not attribute(node, "transB", 0)


class QLinearConv(IntegerLayer, Conv):
    """A convolution of integers."""

    op_type = "QLinearConv"
    axes = range(3, 9)
    position, parts, out, vector, floating = 3, (3, 4, 5), (6, 7), 8, Conv

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False


class DynamicQuantizeMatMul(IntegerLayer):
    """`x @ W` with a float x, which the node quantizes.

    onnxruntime's optimizer writes this operator for dynamically quantized models.
    """

    op_type, domain = "DynamicQuantizeMatMul", MICROSOFT
    position, parts, origin, vector = 1, (1, 2, 3), (0,), 4


class MatMulIntegerToFloat(IntegerLayer):
    """`x @ W` with an integer x. A separate node quantizes x, because several layers read the result."""

    op_type, domain = "MatMulIntegerToFloat", MICROSOFT
    position, parts, origin, vector = 1, (1, 3, 5), (0, 2, 4), 6


class QAttention(IntegerLayer, Attention):
    """An `Attention` with an integer weight."""

    op_type, domain = "QAttention", MICROSOFT
    axes = (2,)
    position, parts, origin, vector, floating = 1, (1, 4, 7), (0, 3, 6), 2, Attention

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        # Refuse a node that outputs a past (keys and values for later calls): `in_floats` does not connect the past.
        return super().takes(node) and not any(out.uses() or out.is_graph_output() for out in node.outputs[1:])

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return True


INTEGER: tuple[type[IntegerLayer], ...] = (
    QLinearMatMul, QGemm, QLinearConv, DynamicQuantizeMatMul, MatMulIntegerToFloat, QAttention,
)  # fmt: skip


def _scale(node: ir.Node, position: int) -> Array:
    scale = input_at(node, position)
    assert scale is not None
    return numbers(scale).astype(np.float64)


def _along(small: Array, axis: int, axes: int) -> Array:
    """Reshape a scale or zero point so that it broadcasts with the weight.

    `small` has one value for the whole weight, or one value for each channel along `axis`.
    """
    return small.reshape(-1, *[1] * (axes - 1 - axis)) if small.size > 1 else small.reshape(-1)


def float_input(node: ir.Node, given: Sequence[int]) -> ir.Value | None:
    """Return a node's input in floats; None if the graph has no such value.

    If a node of the graph quantizes the input, return the value that this node reads. If no node does, or if the
    QuantizeLinear may stand for a Relu (see `rectifies`), return the output of a DequantizeLinear that reads the input.

    Args:
        node: the node.
        given: the positions of the input, its scale and its zero point among the node's inputs, as in
            `IntegerLayer.origin`.
    """
    x = node.inputs[given[0]]
    if len(given) == 1 or x is None:
        return x
    source = x.producer()
    if source is not None and source.op_type == "DynamicQuantizeLinear" and source.outputs[0] is x:
        return source.inputs[0]
    if source is not None and source.op_type == "QuantizeLinear" and not rectifies(source):
        return source.inputs[0]
    scale = node.inputs[given[1]]
    for use in x.uses():
        back = use.node
        if back.op_type == "DequantizeLinear" and back.inputs[1] is scale and back.graph is node.graph:
            return back.outputs[0]
    return None


def initializer(building: Building, name: str, array: Array) -> ir.Value:
    """Return an initializer that is registered with the graph; equal arrays under the same `name` share one."""
    value = building.tensor(("stored", name, array.tobytes()), name, lambda: array)
    if not value.is_initializer():
        building.model.graph.register_initializer(value)
    return value


def opened_up(places: Sequence[ResolvedTarget], building: Building) -> list[ResolvedTarget]:
    """Dequantize the inputs and outputs of integer operators, so that adapters can read and change them as floats.

    If the zero point of an operator's output is the lowest or highest integer, the operator may include a Relu. A
    change must be added before the Relu, so such an operator is replaced by a float operator between a DequantizeLinear
    and a QuantizeLinear.

    Returns:
        the targets. If a node was replaced, the targets' spots refer to the new node.
    """
    done: dict[tuple[ir.Node, type[GraphLayer]], tuple[ir.Node, type[GraphLayer]]] = {}
    spots: dict[Spot, Spot] = {}
    for spot in dict.fromkeys(spot for place in places for spot in place.spots):
        key = spot.node, spot.kind
        if not issubclass(spot.kind, IntegerLayer):
            continue
        if key not in done:
            done[key] = _opened(spot.node, spot.kind, building)
        node, kind = done[key]
        spots[spot] = spot if node is spot.node else replace(spot, node=node, kind=kind)
    if not spots:
        return list(places)
    return [replace(place, spots=tuple(spots.get(spot, spot) for spot in place.spots)) for place in places]


def _opened(node: ir.Node, kind: type[IntegerLayer], building: Building) -> tuple[ir.Node, type[GraphLayer]]:
    graph, branch = node.graph, Branch(building, node.name or node.op_type)
    assert graph is not None
    if float_input(node, kind.origin) is None:
        given = [input_at(node, position) for position in kind.origin]
        x = branch.node("DequantizeLinear", given, None, np.float32, None)
        x.shape = None if given[0] is None else given[0].shape
        graph.insert_before(node, branch.nodes)
        branch.nodes.clear()
    out = node.outputs[0]
    scale, zero = (None, None) if kind.out is None else (input_at(node, position) for position in kind.out)
    if scale is None:
        return node, kind
    back = only_reader(out, "DequantizeLinear")
    if back is not None and not _rectified(back):
        return node, kind
    y = branch.node("DequantizeLinear", [out, scale, zero], None, np.float32, None)
    dtype = np.dtype(np.uint8) if zero is None else numbers(zero).dtype
    again = branch.node("QuantizeLinear", [y, scale, zero], None, dtype, None)
    y.shape = again.shape = out.shape
    graph.insert_after(node, branch.nodes)
    takes_over(out, again, branch)
    last = branch.nodes[-1]
    branch.nodes.clear()
    return (node, kind) if not rectifies(last) else _in_floats(node, kind, last, building)


def _rectified(back: ir.Node) -> bool:
    """Whether the zero point of a DequantizeLinear is the lowest or highest integer; see `rectifies`."""
    return rectifies(ir.node("QuantizeLinear", [None, *back.inputs[1:]]))


def _in_floats(
    node: ir.Node, kind: type[IntegerLayer], quantizer: ir.Node, building: Building
) -> tuple[ir.Node, type[GraphLayer]]:
    """Replace an integer operator by a float operator that feeds `quantizer`; return the float node and its class."""
    graph, branch = node.graph, Branch(building, node.name or node.op_type)
    assert graph is not None
    layer = kind(node, branch)
    axis = {"axis": kind.axis(node)}
    W = branch.node("DequantizeLinear", kind.stored(node), axis, np.float32, kind.stored_shape(node))
    if kind.turns(node) != kind.floating.turns(node):
        W = branch.node("Transpose", [W], {"perm": [1, 0]}, np.float32, None)
    given = [input_at(node, position) for position in kind.origin]
    y = layer.in_floats(W, branch.node("DequantizeLinear", given, None, np.float32, None))
    floating = next(one for one in branch.nodes if one.op_type == kind.floating.op_type)
    in_module_of(node, branch)
    graph.insert_after(node, branch.nodes)
    back = quantizer.inputs[0]
    assert back is not None
    quantizer.replace_input_with(0, y)
    y.shape = back.shape
    floating.name = node.name
    for old in (back.producer(), node):
        if old is not None and not any(out.uses() or out.is_graph_output() for out in old.outputs):
            graph.remove(old, safe=True)
    branch.nodes.clear()
    return floating, kind.floating


def in_module_of(node: ir.Node, branch: Branch) -> None:
    """Copy the metadata of a node to the nodes of the branch that replaces it.

    DequantizeLinear and Transpose nodes get no metadata. The Add of a bias gets the name `{node.name}_bias`.
    """
    for one in branch.nodes:
        if one.op_type not in ("DequantizeLinear", "Transpose"):
            one.metadata_props.update(node.metadata_props)
        if one.op_type == "Add":
            one.name = branch.building.name(f"{node.name}_bias")
