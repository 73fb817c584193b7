"""Give the layers of a graph the interface that formulas use; see `adapterkit/torch/layers.py`.

Formulas see a weight as `[out, in, *k]`, however the node stores it. A layer's input and output are graph values, and
the result of a formula replaces the output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Malformed, Unsupported
from .building import Array, Attribute, Branch, Dtype, element_type, kind_of
from .operands import attribute, detached_copy, is_constant, numbers, shape_of
from .values import Unsayable, Value

BEFORE = "adapterkit.weight"
"""Prefix of a metadata key. A node has such a key if injected nodes compute its weight or bias.

In `adapterkit.weight.1`, 1 is the position of the weight or bias among the node's inputs. The key's value is the name
of the base's tensor that the node read at this position before the injection.
"""


def weight_at(node: ir.Node, position: int) -> ir.Value | None:
    """Return the weight or bias that a node reads; if injected nodes compute it, return the base's tensor instead."""
    name, graph, read = node.metadata_props.get(f"{BEFORE}.{position}"), node.graph, node.inputs[position]
    if name is None:
        return read
    value = graph.initializers.get(name) if isinstance(graph, ir.Graph) else None
    # Some exporters share a tensor through an Identity, so the base's tensor may be an Identity's output.
    return value or _behind(read, name) or read


def _behind(value: ir.Value | None, name: str) -> ir.Value | None:
    """Search `value` and everything that it is computed from; return the value called `name`, or None."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        if one.name == name:
            return one
        seen.add(one)
        node = one.producer()
        waiting += [] if node is None else node.inputs
    return None


class GraphLayer:
    """A node whose weight an adapter can change; each subclass is for one operator.

    Class attributes:
        op_type: the node's operator.
        position: the position of the weight among the node's inputs.
        axes: how many axes the weight may have.
        inside: True if the output is not a function of `x @ W` alone. Then nodes after the layer cannot express a
            change of the weight, and nodes before the layer compute the changed weight; see inside.py.
        whole: True if the stored tensor and the weight have different axes. A merge then replaces the whole tensor.
        indexed: True if the layer's input is a tensor of indices, whose dtype is not the weight's dtype.
        vector: the position of the bias among the node's inputs; None if the operator adds no bias.

    Args:
        node: the node.
        branch: collects the nodes that formulas append.

    Attributes:
        after: a pair: an Add that follows the node, and the layer's bias, which this Add adds. None if there is no such
            Add, e.g. because the node itself adds the bias.
        apart: True if the vector that is added to the product is not the layer's bias; see biases.py.
        call: the inputs of the model's call, for formulas that read them; see calls.py.
        moved: the value with which a formula replaced the module's input; always None for a plain layer, see `Ended`
            in outlets.py.
    """

    op_type: ClassVar[str] = ""
    position: ClassVar[int] = 1
    axes: ClassVar[Container[int]] = (2,)
    inside: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    indexed: ClassVar[bool] = False
    vector: ClassVar[int | None] = None
    moved: ClassVar[Value | None] = None

    def __init__(self, node: ir.Node, branch: Branch) -> None:
        self.node, self.branch = node, branch
        self.apart = node in branch.building.apart
        plain = dequantized(self.result)
        self.after = None if self.apart or self.stated_bias is not None else self._bias_after(plain)
        end = plain if self.after is None else dequantized(self.after[0].outputs[0])
        self.given, self.end = self.unfolded(self.read, end)
        # Some converters remove the dtypes of values. For a value without a dtype, assume the weight's dtype, unless
        # the value is an input of indices.
        self.x = self._value(self.given, like=None if self.indexed else self.dtype)
        self.y = self._value(self.end, like=self.dtype)
        self.call: object = None

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        """Whether this class can represent a node. The node's weight must not depend on the model's inputs."""
        known = node.op_type == cls.op_type and node.domain in ("", "ai.onnx") and len(node.inputs) > cls.position
        weight = weight_at(node, cls.position) if known else None
        return weight is not None and is_constant(weight) and len(shape_of(weight)) in cls.axes

    def unfolded(self, given: ir.Value, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the layer's input and output.

        A Gemm may be between two Reshapes, which merge the batch and position axes and split them again. Then the
        layer's input is the first Reshape's input, and its output is the second Reshape's output.

        Args:
            given: the input that the node reads.
            end: the output of the node, or of the Add that adds the bias after the node.
        """
        return given, end

    @property
    def read(self) -> ir.Value:
        """The input of the node, before any QuantizeLinear and DequantizeLinear."""
        return before_rounding(self.node.inputs[0])

    @property
    def result(self) -> ir.Value:
        """The output of the node, before any other node adds a bias to it."""
        return self.node.outputs[0]

    @classmethod
    def operand_of(cls, node: ir.Node) -> ir.Value:
        """Return the node's input that is the weight.

        Raises:
            Malformed: the node has no weight, although its operator requires one.
        """
        weight = weight_at(node, cls.position)
        if weight is None:
            why = f"a {node.op_type} node has no weight: its input {cls.position} is missing"
            raise Malformed(why, where=node.name or node.op_type, cure="The graph is damaged: export it again")
        return weight

    @classmethod
    def stored_shape(cls, node: ir.Node) -> tuple[int, ...]:
        """Return the shape of the weight, in the node's axis order."""
        return shape_of(cls.operand_of(node))

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        """Return the weight as an array, in the node's axis order."""
        return numbers(cls.operand_of(node))

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        """Return a function that returns the weight as it is now, even if the node is changed later."""
        copy = detached_copy(cls.operand_of(node))
        return lambda: numbers(copy)

    @property
    def operand(self) -> ir.Value:
        """The node's input that is the weight."""
        return self.operand_of(self.node)

    @property
    def dtype(self) -> Dtype:
        """The dtype that the layer computes in."""
        return element_type(self.operand)

    @property
    def channel(self) -> int:
        """The axis of the output that holds the channels, counted from the back."""
        return -1

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, `[out, in, *k]`."""
        first, second, *rest = self.stored_shape(self.node)
        return (second, first, *rest) if self.turns(self.node) else (first, second, *rest)

    @property
    def weight(self) -> Value:
        shape, read = self.stored_shape(self.node), self.node.inputs[self.position]
        if read is not None and f"{BEFORE}.{self.position}" in self.node.metadata_props:
            # Nodes of another target already change this weight, e.g. other rows of it. Continue from their result.
            known = (lambda: numbers(read)) if is_constant(read) else None
            return self.seen(Value(self.branch, shape, self.dtype, read, known))
        # For a packed weight, give formulas an unpacked copy, because the graph has no float value of the weight.
        value = self.operand if element_type(self.operand) == self.dtype else None
        return self.seen(Value(self.branch, shape, self.dtype, value, lambda: self.stored_array(self.node)))

    @property
    def stated_bias(self) -> ir.Value | None:
        """The value that the node itself adds (the bias, a matrix or a computed value); None if it adds nothing."""
        stated = self.vector is not None and len(self.node.inputs) > self.vector
        return weight_at(self.node, self.vector) if self.vector is not None and stated else None

    @property
    def constant_bias(self) -> ir.Value | None:
        """The bias that the node itself adds; None if the node adds none, or if the bias is not constant."""
        bias = self.stated_bias
        return bias if is_constant(bias) else None

    @property
    def stored_bias(self) -> ir.Value | None:
        """The layer's bias, which the node or an Add after the node adds; None if the layer has none."""
        if self.apart:
            return None
        return self.constant_bias if self.after is None else self.after[1]

    @property
    def adds_more(self) -> bool:
        """Whether the node adds something other than the layer's bias. Then formulas cannot recompute the output."""
        return self.stated_bias is not None and self.bias is None

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.shape[0]

    def _bias_after(self, out: ir.Value) -> tuple[ir.Node, ir.Value] | None:
        return None if self.inside else bias_after(self.node, out, self.outputs, self.channel)

    @property
    def bias(self) -> Value | None:
        bias_value = self.stored_bias
        if bias_value is None:
            return None
        b = Value(self.branch, shape_of(bias_value), self.dtype, bias_value, lambda: numbers(bias_value))
        return b if b.ndim == 1 else b.reshape(math.prod(b.shape))

    @property
    def direct(self) -> bool:
        """Whether `op` accepts a weight with more or fewer outputs than the layer's weight."""
        return True

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        """Whether the node stores its weight with `in` before `out`."""
        return True

    def seen(self, W: Value) -> Value:
        """Convert a weight from the node's axis order to `[out, in, *k]`, or back."""
        return W.swapaxes(0, 1) if self.turns(self.node) else W

    def back(self, W: Value) -> Value:
        """Convert a weight from `[out, in, *k]` to the tensor that the node reads."""
        return self.seen(W)

    def back_bias(self, b: Value) -> Value:
        """Convert a bias from `[out]` to the tensor that the node reads."""
        return b

    def __call__(self, x: Value) -> Value:
        if x is self.x:
            return self.y
        if self.adds_more:
            raise Unsayable(f"the {self.node.op_type} node adds something that is not a bias")
        y = self.op(x, self.weight)
        return y if self.bias is None else y + self.per_channel(self.bias)

    def hidden(self, x: Value) -> Value:
        return self(x)

    def residual(self, x: Value) -> Value | None:
        return None

    def norm(self, h: Value) -> Value:
        return h

    def close(self, h: Value, x: Value, whole: bool = True) -> Value:
        return h

    def op(self, x: Value, w: Value) -> Value:
        return x @ self._of(x, w).mT

    def mix(self, h: Value, w: Value) -> Value:
        return h @ self._of(h, w).mT

    def per_channel(self, v: Value) -> Value:
        return v

    def _of(self, x: Value, w: object) -> Value:
        return w if isinstance(w, Value) else x.like(w)

    def _value(self, value: ir.Value, like: Dtype | None = None) -> Value:
        sizes = None if value.shape is None else tuple(s if isinstance(s, int) else None for s in value.shape)
        dtype = element_type(value) if value.dtype is not None or like is None else like
        return Value(self.branch, sizes, dtype, value)


class MatMul(GraphLayer):
    """`x @ W`: a linear layer; exporters write it for inputs with more than two axes."""

    op_type = "MatMul"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and not is_constant(node.inputs[0])


class LeftMatMul(GraphLayer):
    """`W @ x`: a linear layer along the second to last axis."""

    op_type = "MatMul"
    position = 0

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and not is_constant(node.inputs[1])

    @property
    def read(self) -> ir.Value:
        return before_rounding(self.node.inputs[1])

    @property
    def channel(self) -> int:
        return -2

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    def op(self, x: Value, w: Value) -> Value:
        return self._of(x, w) @ x

    def mix(self, h: Value, w: Value) -> Value:
        return self._of(h, w) @ h

    def per_channel(self, v: Value) -> Value:
        return v.reshape(-1, 1)


class _Single:
    """A mixin for layers whose matrix has leading axes of size 1, which some converters add, e.g. `[1, in, out]`."""

    position: ClassVar[int]
    whole: ClassVar[bool] = True
    axes: ClassVar[Container[int]] = range(3, 9)

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        parent: Any = super()
        return bool(parent.takes(node)) and {*shape_of(node.inputs[cls.position])[:-2]} == {1}  # type: ignore[arg-type]

    @classmethod
    def stored_shape(cls, node: ir.Node) -> tuple[int, ...]:
        return shape_of(node.inputs[cls.position])[-2:]  # type: ignore[arg-type]

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return numbers(node.inputs[cls.position]).reshape(cls.stored_shape(node))  # type: ignore[arg-type]

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        copy, shape = detached_copy(node.inputs[cls.position]), cls.stored_shape(node)  # type: ignore[arg-type]
        return lambda: numbers(copy).reshape(shape)

    @property
    def weight(self) -> Value:
        layer: Any = self
        plain = Value(
            layer.branch, self.stored_shape(layer.node), layer.dtype, None, lambda: self.stored_array(layer.node)
        )
        seen: Value = layer.seen(plain)
        return seen


class SingleMatMul(_Single, MatMul):
    """`x @ W` with `W` stored as `[1, in, out]`."""


class SingleLeftMatMul(_Single, LeftMatMul):
    """`W @ x` with `W` stored as `[1, out, in]`."""


class Einsum(GraphLayer):
    """`...i,io->...o` or `...i,oi->...o`: a linear layer along the last axis."""

    op_type = "Einsum"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and len(node.inputs) == 2 and cls.labels(node) is not None

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        labels = cls.labels(node)
        return labels is not None and labels[0] == "io"

    @classmethod
    def labels(cls, node: ir.Node) -> tuple[str] | None:
        """Return the axis order of the weight; see `_labels_in`."""
        return _labels_in(str(attribute(node, "equation", "")).replace(" ", ""))


class LeftEinsum(Einsum):
    """`io,...i->...o` or `oi,...i->...o`: an `Einsum` whose first operand is the weight."""

    position = 0

    @property
    def read(self) -> ir.Value:
        return before_rounding(self.node.inputs[1])

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and not is_constant(node.inputs[1])

    @classmethod
    def labels(cls, node: ir.Node) -> tuple[str] | None:
        equation = str(attribute(node, "equation", "")).replace(" ", "")
        operands, arrow, result = equation.partition("->")
        first, comma, second = operands.partition(",")
        return _labels_in(f"{second}{comma}{first}{arrow}{result}")


def _labels_in(equation: str) -> tuple[str] | None:
    """Return the axis order of an Einsum's weight, `io` or `oi`; None if the equation is not a linear layer."""
    match = re.fullmatch(r"([A-Za-z.]*)([A-Za-z]),([A-Za-z])([A-Za-z])->([A-Za-z.]*)([A-Za-z])", equation)
    if match is None:
        return None
    lead, into, first, second, left, out = match.groups()
    if lead != left or into == out or {into, out} & set(lead) or len(set(lead) - {"."}) + lead.count(".") != len(lead):
        return None
    return {(into, out): ("io",), (out, into): ("oi",)}.get((first, second))


class Gemm(GraphLayer):
    """`alpha * x @ W + beta * C`: a linear layer for inputs of two axes; x and W may be transposed."""

    op_type = "Gemm"
    vector: ClassVar[int | None] = 2

    def __init__(self, node: ir.Node, branch: Branch) -> None:
        super().__init__(node, branch)
        for name in ("alpha", "beta"):
            if attribute(node, name, 1.0) != 1.0:
                why = f"this Gemm has {name} = {attribute(node, name, 1.0)}, but only {name} = 1 is supported"
                cure = "Multiply the weight by alpha and the bias by beta, and set both attributes to 1"
                raise Unsupported(why, where=node.name, cure=cure)

    @property
    def constant_bias(self) -> ir.Value | None:
        bias = super().constant_bias
        # A Gemm may also add a matrix or a scalar, e.g. a residual that onnxruntime's optimizer fused into it.
        return None if bias is None or not by_channel(shape_of(bias), self.outputs, -1) else bias

    def unfolded(self, given: ir.Value, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        folded, back = given.producer(), only_reader(end, "Reshape")
        if back is None or not _is(folded, "Reshape") or attribute(self.node, "transA", 0):
            return given, end
        whole, out = folded.inputs[0], back.outputs[0]  # type: ignore[union-attr]
        if whole is None or whole.shape is None or out.shape is None or len(whole.shape) != len(out.shape):
            return given, end
        first, second, *_ = self.stored_shape(self.node)
        ends = (second, first) if self.turns(self.node) else (first, second)
        before, after = (*whole.shape[:-1], ends[1]), (*out.shape[:-1], ends[0])
        # A Reshape may do more than merge the batch and position axes. For example, it may merge the heads into the
        # layer's channels, as in torch's MultiheadAttention, or it may split the rows into other axes. In such cases,
        # keep the input and output of the Gemm.
        pairs = [*zip(before, whole.shape, strict=True), *zip(after, out.shape, strict=True)]
        pairs += zip(before[:-1], after[:-1], strict=True)
        apart = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        return (given, end) if apart else (whole, out)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return not attribute(node, "transB", 0)

    def op(self, x: Value, w: Value) -> Value:
        if attribute(self.node, "transA", 0):
            # The input of a Gemm always has two axes, even if the graph does not store the input's shape.
            x = Value(self.branch, x.sizes or (None, None), x.dtype, x.value, x.known).swapaxes(0, 1)
        return super().op(x, w)


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """If only one node reads `value` and its operator is `op_type`, return this node; otherwise return None.

    Also return None if no node computes `value`, if `value` is a graph output, or if the node that computes it is in
    another graph than the node that reads it.
    """
    uses, made_by = list(value.uses()), value.producer()
    if len(uses) != 1 or value.is_graph_output() or made_by is None or uses[0].node.graph is not made_by.graph:
        return None
    return uses[0].node if _is(uses[0].node, op_type) else None


def before_rounding(output: ir.Value | None) -> ir.Value:
    """If a QuantizeLinear and a DequantizeLinear compute `output`, return the value that the QuantizeLinear reads.

    Otherwise, or if the QuantizeLinear may stand for a Relu (see `rectifies`), return `output`.
    """
    assert output is not None
    back = output.producer()
    there = back.inputs[0].producer() if _is(back, "DequantizeLinear") and back.inputs[0] is not None else None  # type: ignore[union-attr]
    rounded = _is(there, "QuantizeLinear") and not rectifies(there)  # type: ignore[arg-type]
    return there.inputs[0] if rounded else output  # type: ignore[union-attr, return-value]


def dequantized(value: ir.Value) -> ir.Value:
    """If the graph quantizes `value` and dequantizes the result, return the dequantized value.

    Otherwise, or if the QuantizeLinear may stand for a Relu (see `rectifies`), return `value`. An adapter's change is
    added to the returned value: before the QuantizeLinear, the change would be clipped.
    """
    there = only_reader(value, "QuantizeLinear")
    there = None if there is None or rectifies(there) else there
    back = None if there is None else only_reader(there.outputs[0], "DequantizeLinear")
    return value if back is None else back.outputs[0]


def rectifies(node: ir.Node) -> bool:
    """Whether a QuantizeLinear may stand for a Relu or Clip of the float model, because its range ends at 0.

    onnxruntime's static quantizer removes a Relu or a Clip before a QuantizeLinear that clips the same values. If the
    zero point is not constant, the range is unknown, and the function returns True.
    """
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and not is_constant(zero):
        return True
    kind = ir.DataType(attribute(node, "output_dtype", 0) or ir.DataType.UINT8) if zero is None else kind_of(zero)
    if kind.is_floating_point():
        return False
    limits: Any = import_module("ml_dtypes").iinfo(kind.numpy())
    zeros = np.zeros(1) if zero is None else numbers(zero).astype(np.int64)
    return bool(np.isin(zeros, (int(limits.min), int(limits.max))).any())


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx")


def bias_after(node: ir.Node, out: ir.Value, outputs: int, channel: int) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that adds a bias to a layer's output, and the bias; None if there is no such Add.

    The Add must be the only node that reads the output, and must add a constant with one element per channel.

    Args:
        node: the layer's node.
        out: the layer's output, before the Add.
        outputs: the number of output channels.
        channel: the axis of the output's channels, counted from the back.
    """
    add = only_reader(out, "Add")
    if add is None:
        return None
    other = add.inputs[1 - list(add.inputs).index(out)]
    if other is None or not is_constant(other) or not by_channel(shape_of(other), outputs, channel):
        return None
    # A constant with more axes than the layer's output is not a bias, because adding it would give the output more
    # axes. The graph may lack the output's shape, so also use the inputs' shapes: most outputs have as many axes as the
    # input.
    most = max(2, -channel, *(axes_of(value) for value in (out, *node.inputs[:2])))
    return (add, other) if len(shape_of(other)) <= most else None


def axes_of(value: ir.Value | None) -> int:
    """Return a value's number of axes, from its shape or the Transpose that computes it; 0 if neither is known."""
    if value is None or value.shape is not None:
        return 0 if value is None or value.shape is None else len(value.shape)
    order = attribute(node, "perm", ()) if (node := value.producer()) is not None and _is(node, "Transpose") else ()
    return len(order)


def by_channel(shape: Sequence[int], outputs: int, channel: int) -> bool:
    """Whether an array of this shape has one element per output channel. If not, it may be a mask or position table."""
    at = len(shape) + channel
    return at >= 0 and shape[at] == outputs and math.prod(shape) == outputs


FUSED_BIASES = {
    "SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3, "SkipGroupNorm": 4, "BiasGelu": 1,
    "FastGelu": 1, "BiasSplitGelu": 1, "BiasAdd": 1,
}  # fmt: skip
"""Fused operators of onnxruntime, each with the position of the bias among the operator's inputs."""


PACKED_BIASES = {"MultiHeadAttention": 3, "PackedMultiHeadAttention": 3, "DecoderMaskedMultiHeadAttention": 10}
"""Attention operators of onnxruntime, each with the position of the input that packs the biases of q, k and v."""


def refuse_fused_bias(layer: GraphLayer, where: str) -> None:
    """Raise an error if a fused node adds a bias to the layer's output, because an adapter cannot change this bias.

    A fused node that adds the outputs of two layers is refused for both layers: its bias may belong to either.

    Raises:
        Unsupported: a fused node adds a bias to the layer's output.
    """
    for use in [] if layer.inside else layer.result.uses():
        node, position = use.node, FUSED_BIASES.get(use.node.op_type)
        cut = next(iter(node.outputs[0].uses()), None) if node.op_type == "Slice" else None
        if cut is not None and cut.node.op_type == "MultiHeadAttention" and cut.node.inputs[3] is not None:
            node = cut.node
        elif node.op_type in PACKED_BIASES:
            if not _adds_at(node, use.idx, layer.outputs):
                continue
        elif node.domain != "com.microsoft" or position is None or len(node.inputs) <= position:
            continue
        why = f"the bias of this layer is inside a {node.op_type} node, where an adapter cannot change it"
        raise Unsupported(why, where=where, cure="Use the graph before it is optimized")


def _adds_at(node: ir.Node, at: int, outputs: int) -> bool:
    """Whether an attention node may add a nonzero bias to its queries (`at` is 0), keys (1) or values (2)."""
    position = PACKED_BIASES[node.op_type]
    bias = node.inputs[position] if len(node.inputs) > position else None
    if bias is None or at > 2:
        return False
    if not is_constant(bias):
        return True
    b = numbers(bias).reshape(-1)
    # The vector concatenates the biases of queries, keys and values. The last bias may have another size.
    return bool((b[at * outputs : (at + 1) * outputs] if at < 2 else b[-outputs:]).any())


# Layers other than matrix products: convolutions along any number of axes, and embeddings.


class Conv(GraphLayer):
    """A convolution along any number of axes, grouped or not."""

    op_type = "Conv"
    floating_type: ClassVar[str] = "Conv"  # In packed and fused convolutions, `op_type` differs.
    axes = range(3, 9)
    vector: ClassVar[int | None] = 2

    @property
    def channel(self) -> int:
        return 1 - len(self.shape)

    @property
    def direct(self) -> bool:
        return bool(attribute(self.node, "group", 1) == 1)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    def op(self, x: Value, w: Value) -> Value:
        w = self._of(x, w)
        # Drop `kernel_shape`: the new kernel may have another shape, and ONNX infers the shape without the attribute.
        kept = {name: attribute.value for name, attribute in self.node.attributes.items() if name != "kernel_shape"}
        # If each filter of the new weight reads the channels of all groups, convolve without groups.
        if len(w.shape) == len(self.shape) and w.shape[1] != self.shape[1]:
            return self._convolved(x, w, w.shape[0], kept | {"group": 1})
        whole = w.reshape(w.shape[0], *self.shape[1:])
        return self._convolved(x, self.seen(whole), w.shape[0], kept)

    def mix(self, h: Value, w: Value) -> Value:
        w = self._of(h, w)
        # Mix channels by a convolution with a kernel of size 1.
        point = w.reshape(*w.shape[:2], *[1] * (len(self.shape) - 2))
        return self._node("Conv", h, point, w.shape[0], {})

    def per_channel(self, v: Value) -> Value:
        return v.reshape(-1, *[1] * (len(self.shape) - 2))

    def _convolved(self, x: Value, w: Value, out: int, attributes: Mapping[str, Attribute]) -> Value:
        return self._node(self.floating_type, x, w, out, attributes)

    def _node(self, op: str, x: Value, w: Value, out: int, attributes: Mapping[str, Attribute]) -> Value:
        sizes = (None, out, *[None] * (len(self.shape) - 2))
        node = self.branch.node(op, [x.value, w.value], attributes, x.dtype, None)
        return Value(self.branch, sizes, x.dtype, node)


class ConvTranspose(Conv):
    """A transposed convolution; its weight is stored as `[in, out / groups, *k]`."""

    op_type = floating_type = "ConvTranspose"

    @property
    def outputs(self) -> int:
        return self.shape[0] * int(attribute(self.node, "group", 1))

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return True


class Gather(GraphLayer):
    """An embedding: looks up rows of a table `[in, out]`; a token is an index along `in`."""

    op_type = "Gather"
    position = 0
    indexed = True

    def _bias_after(self, out: ir.Value) -> None:
        return None

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = super().takes(node) and attribute(node, "axis", 0) == 0 and not is_constant(node.inputs[1])
        return plain and element_type(node.inputs[0]).kind not in "iub"

    @property
    def read(self) -> ir.Value:
        indices = self.node.inputs[1]
        assert indices is not None
        return indices

    def op(self, x: Value, w: Value) -> Value:
        table = self._of(self.y, w).swapaxes(0, 1)
        sizes = None if x.sizes is None else (*x.sizes, table.shape[1])
        node = self.branch.node("Gather", [table.value, x.value], {"axis": 0}, table.dtype, None)
        return Value(self.branch, sizes, table.dtype, node)
