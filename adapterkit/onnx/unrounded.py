"""Remove the rounding of activations from a quantized graph, so that a check can compare two graphs closely.

Two correct graphs may sum in different orders, so their values may differ in the last bit. If a later node rounds such
a value to 8 bits, the difference can become a whole rounding step. Clipping is another cause of differences: one graph
may add an adapter's change to an activation before it clips the activation, and the other graph may add the change
afterwards. Without rounding and clipping of activations, the outputs of two correct graphs differ only in the last bits
of the floats. The weights stay rounded: the graph computes with their dequantized values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .building import Array, Attribute, Branch, Building
from .layers import rectifies
from .operands import attribute, input_at, is_constant, numbers, shape_of

MICROSOFT = "com.microsoft"

MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Gather", "Slice", "Concat",
     "Split", "Expand", "MaxPool", "DepthToSpace", "SpaceToDepth", "Tile", "Resize", "Pad"}
)  # fmt: skip
"""Operators that commute with dequantization. They can therefore read floats in place of quantized integers.

A Resize commutes with dequantization because its interpolation weights sum to 1. The constant that a Pad inserts must
be dequantized, too.
"""


ROUGH = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
"""Operators that quantize a floating-point input. A difference in the input's last bit can become a whole quantization
step."""


def rounds(node: ir.Node) -> bool:
    """Whether a node rounds activations, or computes with rounded activations."""
    if node.op_type == "QuantizeLinear" and is_constant(node.inputs[0]):
        return False
    return node.op_type in ROUGH or node.op_type in FORMS or node.op_type.startswith("QLinear")


class Unknown(Exception):
    """Raised for a node that reads rounded activations and has no known float form."""


def unround(model: ir.Model) -> bool:
    """Remove the rounding of activations from `model`. Return False if this fails; the model is then unusable."""
    return obstacle(model) is None


def obstacle(model: ir.Model) -> str | None:
    """Remove the rounding of activations from `model`.

    Returns:
        The operator and the name of the node that could not be converted; None if all nodes were converted.
    """
    for node in model.graph.all_nodes():
        node.attributes.pop("accuracy_level", None)
    unrounding = _Unrounding(model)
    try:
        unrounding.done()
    except Unknown:
        assert unrounding.at is not None
        return f"{unrounding.at.op_type} {unrounding.at.name or unrounding.at.outputs[0].name}"
    return None


class _Unrounding:
    """The conversion of a graph's rounded activations to floats.

    Args:
        model: the model to change.

    Attributes:
        floats: a map from each quantized activation to the float activation that replaces it.
        steps: a map from each quantized activation to its scale and its zero point.
        at: the node that is being converted.
    """

    def __init__(self, model: ir.Model) -> None:
        self.building = Building(model)
        self.graph = model.graph
        self.floats: dict[ir.Value, ir.Value] = {}
        self.steps: dict[ir.Value, tuple[ir.Value | None, ir.Value | None]] = {}
        self.at: ir.Node | None = None
        self.branch = Branch(self.building, "unrounded")
        self.gone: list[ir.Node] = []

    def done(self) -> None:
        for node in self.graph.all_nodes():
            self.at = node
            if node.graph is not self.graph and rounds(node):
                raise Unknown
        for node in list(self.graph):
            self.at = node
            self._changed(node)
        for node in reversed(self.gone):
            self.at = node
            if any(out.uses() or out.is_graph_output() for out in node.outputs):
                raise Unknown
            self.graph.remove(node, safe=True)
        self.building.settle()

    def _changed(self, node: ir.Node) -> None:
        """Convert a node to floats if the node rounds, or if it reads a rounded value."""
        make = FORMS.get(node.op_type)
        known = node.domain in ("", "ai.onnx", MICROSOFT)
        if node.op_type == "QuantizeLinear" and known:
            if not is_constant(node.inputs[0]):
                self.steps[node.outputs[0]] = input_at(node, 1), input_at(node, 2)
                self._becomes(node, self._clipped(_given(node, 0), node))
        elif node.op_type == "DynamicQuantizeLinear" and known:
            one = self.building.literal(np.ones((), np.float32))
            ir.convenience.replace_all_uses_with(node.outputs[1], one)
            self._becomes(node, _given(node, 0))
        elif make is not None and known:
            self._becomes(node, make(self, node))
        elif any(value in self.floats for value in node.inputs if value is not None):
            if node.op_type == "DequantizeLinear":
                self._becomes(node, self.floats[_given(node, 0)])
            elif node.op_type == "Cast" and known:
                node.replace_input_with(0, self.floats[_given(node, 0)])
            elif node.op_type in MOVES and known:
                steps = self.steps.get(_given(node, 0), (None, None))
                if node.op_type in ("Resize", "Pad"):
                    self._outside(node, *steps)
                for position, value in enumerate(node.inputs):
                    if value in self.floats:
                        node.replace_input_with(position, self.floats[value])
                for out in node.outputs:
                    out.type = None
                    self.floats[out] = out
                    self.steps[out] = steps
            else:
                raise Unknown

    def _outside(self, node: ir.Node, scale: ir.Value | None, zero: ir.Value | None) -> None:
        """Dequantize the constant that a Pad inserts; `scale` and `zero` belong to the value that is padded.

        Raise `Unknown` for a Resize that inserts a constant.
        """
        if node.op_type == "Resize":
            if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":  # Inserts a constant.
                raise Unknown
        elif attribute(node, "mode", "constant") == "constant":
            given = [_given(node, 2), scale, zero]
            if scale is None or any(one is not None and not is_constant(one) for one in given):
                raise Unknown
            q, step, origin = (0.0 if one is None else float(numbers(one).reshape(())) for one in given)
            number = (q - origin) * step
            node.replace_input_with(2, self.building.literal(np.asarray(number, np.float32)))

    def _becomes(self, node: ir.Node, value: ir.Value) -> None:
        """Insert the nodes that compute `value`, which replaces the node's first output.

        If this output is float, the nodes that read it get `value` now. If the output is integer, each node that reads
        it gets `value` when that node is converted.
        """
        out = node.outputs[0]
        self.graph.insert_before(node, [one for one in self.branch.nodes if one.graph is None])
        self.branch.nodes.clear()
        self.gone.append(node)
        to_floats = ("DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention")
        if node.op_type in to_floats or (node.op_type == "QGemm" and input_at(node, 7) is None):
            same = self.node("Identity", [value])
            self.graph.insert_before(node, self.branch.nodes)
            self.branch.nodes.clear()
            if out.is_graph_output():
                at = list(self.graph.outputs).index(out)
                same.name, out.name = out.name, self.building.name(f"{out.name}.rounded")
                same.shape, same.type = out.shape, out.type
                self.graph.outputs[at] = same
            ir.convenience.replace_all_uses_with(out, same)
        elif out.is_graph_output():
            raise Unknown
        else:
            self.floats[out] = value

    def node(self, op: str, given: Sequence[ir.Value | None], words: Mapping[str, Attribute] | None = None,
             domain: str = "") -> ir.Value:  # fmt: skip
        """Append a node, and return its output."""
        out = self.branch.node(op, given, words, np.float32, None, domain=domain)
        out.type = None  # Leave the type open, because the graph may compute in 16 bits.
        return out

    def float_of(self, node: ir.Node, at: int, axis: int | None = None) -> ir.Value:
        """Return a node's operand as floats. The two inputs after the operand are its scale and its zero point.

        Args:
            node: the node.
            at: the index of the operand among the node's inputs.
            axis: the operand's channel axis; None for the last axis. If each channel has its own scale, the scales are
                in the order of this axis.
        """
        value, scale, zero = (input_at(node, at + step) for step in range(3))
        return self.operand(value, scale, zero, axis)

    def operand(
        self, value: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int | None = None
    ) -> ir.Value:
        """Return quantized integers as floats: `(value - zero) * scale`."""
        if value is None:
            raise Unknown
        if value in self.floats:
            return self.floats[value]
        if any(one is not None and not is_constant(one) for one in (scale, zero)):
            raise Unknown
        if not is_constant(value):  # No node rounded these integers: they are an input, or rows of an embedding.
            if scale is None or shape_of(scale) not in ((), (1,)):
                raise Unknown
            return self.node("DequantizeLinear", [value, scale, zero])
        q = numbers(value)
        q = q.astype(np.float32 if q.dtype.itemsize < 4 else np.float64)
        at = q.ndim - 1 if axis is None else axis
        z, s = (None if one is None else _spread(numbers(one), q, at) for one in (zero, scale))
        W = q if z is None else q - z
        return self.stored(W if s is None else W * s)

    def stored(self, array: Array) -> ir.Value:
        """Return a new float32 initializer with the elements of `array`."""
        key = "unrounded", len(self.building.tensors)
        return self.building.tensor(key, "unrounded", lambda: np.ascontiguousarray(array, np.float32))

    def rounded(self, y: ir.Value, node: ir.Node, at: int) -> ir.Value:
        """Return the float output that replaces a node's quantized output. Record the output's scale and zero point.

        The float output is clipped at 0 if the range of the integers starts or ends at the zero point; see `rectifies`.

        Args:
            y: the float output before clipping.
            node: the node.
            at: the index of the node's input that contains the output's zero point. The input at index `at - 1`
                contains the output's scale.
        """
        self.steps[node.outputs[0]] = input_at(node, at - 1), input_at(node, at)
        return self._clipped(y, ir.node("QuantizeLinear", [None, None, input_at(node, at)]))

    def _clipped(self, x: ir.Value, quantizer: ir.Node) -> ir.Value:
        """Clip `x` at 0 if the quantizer clips there, i.e. if its range starts or ends at its zero point."""
        zero = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
        if zero is not None and not is_constant(zero):
            raise Unknown
        if not rectifies(quantizer):
            return x
        if zero is None or numbers(zero).astype(np.int64).max() <= 0:
            return self.node("Relu", [x])
        return self.node("Neg", [self.node("Relu", [self.node("Neg", [x])])])


def _given(node: ir.Node, position: int) -> ir.Value:
    value = input_at(node, position)
    if value is None:
        raise Unknown
    return value


def _spread(small: Array, like: Array, axis: int) -> Array:
    """Cast `small` (one number, or one per channel) to the dtype of `like`, and reshape it to broadcast with `like`."""
    flat = small.reshape(-1).astype(like.dtype)
    return flat if flat.size == 1 else flat.reshape(-1, *[1] * (like.ndim - 1 - axis))


def _words(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: node.attributes[name].value for name in names if name in node.attributes}


CONVOLUTION = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _matmul(of: _Unrounding, node: ir.Node) -> ir.Value:
    return of.rounded(of.node("MatMul", [of.float_of(node, 0), of.float_of(node, 3)]), node, 7)


def _conv(of: _Unrounding, node: ir.Node) -> ir.Value:
    if attribute(node, "channels_last", 0):
        raise Unknown
    b = _vector(of, node, 8)
    y = of.node("Conv", [of.float_of(node, 0), of.float_of(node, 3, 0), b], _words(node, *CONVOLUTION))
    return of.rounded(y, node, 7)


def _gemm(of: _Unrounding, node: ir.Node) -> ir.Value:
    turned = bool(attribute(node, "transB", 0))
    b, words = _vector(of, node, 6), _words(node, "alpha", "transA", "transB")
    y = of.node("Gemm", [of.float_of(node, 0), of.float_of(node, 3, 0 if turned else 1), b], words)
    return y if input_at(node, 7) is None else of.rounded(y, node, 8)


def _vector(of: _Unrounding, node: ir.Node, at: int) -> ir.Value | None:
    """Return an integer bias as floats. The bias's scale is the product of the input's scale and the weight's scale."""
    value = input_at(node, at)
    if value is None:
        return None
    steps = [_given(node, 1), _given(node, 4)]
    if not all(is_constant(one) for one in (value, *steps)):
        raise Unknown
    first, second = (numbers(one).astype(np.float64).reshape(-1) for one in steps)
    return of.stored(numbers(value).astype(np.float64).reshape(-1) * first * second)


def _pair(op: str) -> Form:
    return lambda of, node: of.rounded(of.node(op, [of.float_of(node, 0), of.float_of(node, 3)]), node, 7)


def _single(op: str, *names: str) -> Form:
    return lambda of, node: of.rounded(of.node(op, [of.float_of(node, 0)], _words(node, *names)), node, 4)


def _pool(op: str, *names: str) -> Form:
    def make(of: _Unrounding, node: ir.Node) -> ir.Value:
        if attribute(node, "channels_last", 0):
            raise Unknown
        return _single(op, *names)(of, node)

    return make


def _softmax(of: _Unrounding, node: ir.Node) -> ir.Value:
    if attribute(node, "opset", 13) < 13:  # Before opset 13, Softmax flattened the axes after `axis`.
        raise Unknown
    return _single("Softmax", "axis")(of, node)


def _concat(of: _Unrounding, node: ir.Node) -> ir.Value:
    parts = [of.float_of(node, at) for at in range(2, len(node.inputs), 3)]
    return of.rounded(of.node("Concat", parts, _words(node, "axis")), node, 1)


def _where(of: _Unrounding, node: ir.Node) -> ir.Value:
    return of.rounded(of.node("Where", [input_at(node, 0), of.float_of(node, 1), of.float_of(node, 4)]), node, 8)


def _integer_product(of: _Unrounding, node: ir.Node) -> ir.Value:
    """Convert a MatMulInteger, which applies no scales.

    Later nodes multiply its output by the weight's scale and by the input's scale. If a DynamicQuantizeLinear
    computed the input's scale, `_changed` has replaced this scale by 1, because the input stays float.
    """
    W = of.operand(input_at(node, 1), None, input_at(node, 3))
    return of.node("MatMul", [of.operand(input_at(node, 0), None, input_at(node, 2)), W])


def _integer_convolution(of: _Unrounding, node: ir.Node) -> ir.Value:
    W = of.operand(input_at(node, 1), None, input_at(node, 3), 0)
    return of.node("Conv", [of.operand(input_at(node, 0), None, input_at(node, 2)), W], _words(node, *CONVOLUTION))


def _dynamic(of: _Unrounding, node: ir.Node) -> ir.Value:
    y = of.node("MatMul", [_given(node, 0), of.operand(input_at(node, 1), input_at(node, 2), input_at(node, 3))])
    b = input_at(node, 4)
    return y if b is None else of.node("Add", [y, b])


def _to_float(of: _Unrounding, node: ir.Node) -> ir.Value:
    x = of.operand(input_at(node, 0), input_at(node, 2), input_at(node, 4))
    y = of.node("MatMul", [x, of.operand(input_at(node, 1), input_at(node, 3), input_at(node, 5))])
    b = input_at(node, 6)
    return y if b is None else of.node("Add", [y, b])


def _attention(of: _Unrounding, node: ir.Node) -> ir.Value:
    x = of.operand(input_at(node, 0), input_at(node, 3), input_at(node, 6))
    W = of.operand(input_at(node, 1), input_at(node, 4), input_at(node, 7))
    if any(out.uses() for out in node.outputs[1:]) or len(shape_of(_given(node, 1))) != 2:
        raise Unknown
    words = {name: one.value for name, one in node.attributes.items()}
    return of.node("Attention", [x, W, input_at(node, 2), input_at(node, 5), input_at(node, 8)], words, MICROSOFT)


Form = Callable[[_Unrounding, ir.Node], ir.Value]
"""A function that appends the float nodes that replace a quantized node, and returns their output."""

FORMS: dict[str, Form] = {
    "QLinearMatMul": _matmul,
    "QLinearConv": _conv,
    "QGemm": _gemm,
    "QLinearAdd": _pair("Add"),
    "QLinearMul": _pair("Mul"),
    "QLinearSigmoid": _single("Sigmoid"),
    "QLinearLeakyRelu": _single("LeakyRelu", "alpha"),
    "QLinearSoftmax": _softmax,
    "QLinearGlobalAveragePool": _pool("GlobalAveragePool"),
    "QLinearAveragePool": _pool(
        "AveragePool", "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"
    ),
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "MatMulInteger": _integer_product,
    "ConvInteger": _integer_convolution,
    "DynamicQuantizeMatMul": _dynamic,
    "MatMulIntegerToFloat": _to_float,
    "QAttention": _attention,
}
"""A map from each quantized operator to the function that replaces its nodes by float nodes."""
