"""Layers of a graph, in the words of formulas: see `adapterkit/torch/layers.py` for what each word means.

Weights are `[out, in, *k]` whatever the node stores. A layer's input and output are values of the graph; what a
formula makes of them takes the output's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Branch, element_type
from .operands import attribute, is_constant, numbers, shape_of
from .values import Unsayable, Value


class Layer:
    """A node whose weight can be exchanged; subclasses say how.

    Class attributes:
        op_type: what the node is called.
        position: which of its inputs is the weight.

    Args:
        node: the node.
        branch: where nodes are appended.
    """

    op_type: ClassVar[str] = ""
    position: ClassVar[int] = 1

    def __init__(self, node: ir.Node, branch: Branch) -> None:
        self.node, self.branch = node, branch
        self.after = _bias_after(node) if self.own_bias is None else None
        self.end = node.outputs[0] if self.after is None else self.after[0].outputs[0]
        self.x = self._value(self.given)
        self.y = self._value(self.end, like=self.dtype)

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        """Whether a node is such a layer: its weight does not depend on the input."""
        known = node.op_type == cls.op_type and node.domain in ("", "ai.onnx") and len(node.inputs) > cls.position
        return known and is_constant(node.inputs[cls.position])

    @property
    def given(self) -> ir.Value:
        """The value that the layer reads."""
        found = self.node.inputs[0]
        assert found is not None
        return found

    @property
    def operand(self) -> ir.Value:
        """The weight, as the node takes it."""
        found = self.node.inputs[self.position]
        assert found is not None
        return found

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the layer computes in."""
        return element_type(self.operand.dtype)

    @property
    def channel(self) -> int:
        """The axis of the output's channels."""
        return -1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def weight(self) -> Value:
        W = Value(self.branch, shape_of(self.operand), self.dtype, self.operand, lambda: numbers(self.operand))
        return self.seen(W)

    @property
    def own_bias(self) -> ir.Value | None:
        """The bias that the node itself adds."""
        return None

    @property
    def bias(self) -> Value | None:
        held = self.own_bias if self.after is None else self.after[1]
        if held is None:
            return None
        b = Value(self.branch, shape_of(held), self.dtype, held, lambda: numbers(held))
        return b if b.ndim == 1 else b.reshape(math.prod(b.shape))

    @property
    def direct(self) -> bool:
        """Whether `op` takes weights of other numbers of outputs."""
        return True

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        """Whether the node takes its weight with `in` before `out`."""
        return True

    def seen(self, W: Value) -> Value:
        """A weight as stored as `[out, in, *k]`, and back."""
        return W.swapaxes(0, 1) if self.turns(self.node) else W

    def __call__(self, x: Value) -> Value:
        if x is self.x:
            return self.y
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

    def per_channel(self, v: Any) -> Any:
        return v

    def _of(self, x: Value, w: Any) -> Value:
        return w if isinstance(w, Value) else x.like(w)

    def _value(self, value: ir.Value, like: Any = None) -> Value:
        sizes = None if value.shape is None else tuple(s if isinstance(s, int) else None for s in value.shape)
        dtype = element_type(value.dtype) if value.dtype is not None or like is None else like
        return Value(self.branch, sizes, dtype, value)


class MatMul(Layer):
    """`x @ W`: a linear layer as exporters write it for inputs of more than two axes."""

    op_type = "MatMul"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and len(shape_of(node.inputs[1])) == 2 and not is_constant(node.inputs[0])  # type: ignore[arg-type]


class Gemm(Layer):
    """`alpha * x @ W + beta * C`, either operand turned or not: a linear layer of inputs with two axes."""

    op_type = "Gemm"

    def __init__(self, node: ir.Node, branch: Branch) -> None:
        super().__init__(node, branch)
        for name in ("alpha", "beta"):
            if attribute(node, name, 1.0) != 1.0:
                why = f"a Gemm with {name} other than 1"
                raise Unsupported(why, where=node.name, cure="Fold the factor into the weight first")

    @property
    def own_bias(self) -> ir.Value | None:
        held = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if held is not None and not (is_constant(held) and math.prod(shape_of(held)) == self.outputs):
            raise Unsupported("a Gemm whose bias is no vector", where=self.node.name, cure="Export it anew")
        return held

    @property
    def outputs(self) -> int:
        return shape_of(self.operand)[0 if attribute(self.node, "transB", 0) else 1]

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return not attribute(node, "transB", 0)

    def op(self, x: Value, w: Value) -> Value:
        return super().op(x.swapaxes(0, 1) if attribute(self.node, "transA", 0) else x, w)


class Conv(Layer):
    """A convolution along any number of axes, in groups or not."""

    op_type = "Conv"

    @property
    def channel(self) -> int:
        return 1 - len(self.shape)

    @property
    def own_bias(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 and is_constant(self.node.inputs[2]) else None

    @property
    def direct(self) -> bool:
        return bool(attribute(self.node, "group", 1) == 1)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    def op(self, x: Value, w: Value) -> Value:
        w = self._of(x, w)
        kept = {name: held.value for name, held in self.node.attributes.items() if name != "kernel_shape"}
        whole = w.reshape(w.shape[0], *self.shape[1:])
        return self._convolved(x, self.seen(whole), w.shape[0], kept)

    def mix(self, h: Value, w: Value) -> Value:
        w = self._of(h, w)
        point = w.reshape(*w.shape[:2], *[1] * (len(self.shape) - 2))
        return self._node("Conv", h, point, w.shape[0], {})

    def per_channel(self, v: Any) -> Any:
        return v.reshape(-1, *[1] * (len(self.shape) - 2))

    def _convolved(self, x: Value, w: Value, out: int, attributes: dict[str, Any]) -> Value:
        return self._node(self.op_type, x, w, out, attributes)

    def _node(self, op: str, x: Value, w: Value, out: int, attributes: dict[str, Any]) -> Value:
        sizes = (None, out, *[None] * (len(self.shape) - 2))
        node = self.branch.node(op, [x.value, w.value], attributes, x.dtype, None)
        return Value(self.branch, sizes, x.dtype, node)


class ConvTranspose(Conv):
    """A transposed convolution: stores `[in, out / groups, *k]`."""

    op_type = "ConvTranspose"

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return True


class Gather(Layer):
    """An embedding: rows of a table `[in, out]`, a token being a position on `in`."""

    op_type = "Gather"
    position = 0

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = super().takes(node) and attribute(node, "axis", 0) == 0 and not is_constant(node.inputs[1])
        if not plain or node.inputs[0] is None or len(shape_of(node.inputs[0])) != 2:
            return False
        return element_type(node.inputs[0].dtype).kind not in "iub"

    @property
    def given(self) -> ir.Value:
        found = self.node.inputs[1]
        assert found is not None
        return found

    def op(self, x: Value, w: Value) -> Value:
        table = self._of(self.y, w).swapaxes(0, 1)
        sizes = None if x.sizes is None else (*x.sizes, table.shape[1])
        node = self.branch.node("Gather", [table.value, x.value], {"axis": 0}, table.dtype, None)
        return Value(self.branch, sizes, table.dtype, node)


KINDS: tuple[type[Layer], ...] = (MatMul, Gemm, Conv, ConvTranspose, Gather)


def kind_of(node: ir.Node) -> type[Layer] | None:
    """The kind of layer that a node is, or None."""
    return next((kind for kind in KINDS if kind.takes(node)), None)


class Slice:
    """The outputs `start` to `stop` of a layer: what an update of a fused weight's rows sees."""

    def __init__(self, layer: Layer, rows: tuple[int, int]) -> None:
        self.layer, self.rows = layer, slice(*rows)
        self.x, self.branch = layer.x, layer.branch
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct, self.node = layer.op, layer.direct, layer.node

    def __call__(self, x: Value) -> Value:
        return self.cut(self.layer(x), self.rows)

    def cut(self, y: Value, rows: slice) -> Value:
        """Some channels of an output."""
        return y[(..., rows, *[slice(None)] * (-self.channel - 1))]

    @property
    def weight(self) -> Value:
        return self.layer.weight[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def bias(self) -> Value | None:
        b = self.layer.bias
        return None if b is None else b[self.rows]

    def around(self, y: Value, part: Value) -> Value:
        """The whole output, with these channels exchanged."""
        from .symbols import SYMBOLS

        out = self.layer.shape[0]
        pieces = [part]
        if self.rows.start:
            pieces.insert(0, self.cut(y, slice(0, self.rows.start)))
        if self.rows.stop < out:
            pieces.append(self.cut(y, slice(self.rows.stop, out)))
        joined: Value = SYMBOLS.concat(pieces, axis=self.channel)
        return joined


class Turned:
    """A layer seen with its first two axes exchanged, as whole weights of embeddings are stored."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.x, self.branch, self.node = layer, layer.x, layer.branch, layer.node
        self.channel, self.direct, self.per_channel, self.bias = layer.channel, False, layer.per_channel, layer.bias

    def __call__(self, x: Value) -> Value:
        return self.layer(x)

    @property
    def weight(self) -> Value:
        return self.layer.weight.swapaxes(0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def op(self, x: Value, w: Value) -> Value:
        return self.layer.op(x, w.swapaxes(0, 1))

    def mix(self, h: Value, w: Value) -> Value:
        raise Unsayable("a mix of channels behind a turned weight")


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a vector that follows a node and nothing else does, and the vector."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output() or node.op_type == "Gather":
        return None
    add = uses[0].node
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or add.graph is not node.graph:
        return None
    other = add.inputs[1 - uses[0].idx]
    weight = node.inputs[1]
    if other is None or weight is None or not is_constant(other):
        return None
    shape = shape_of(other)
    return (add, other) if len(shape) == 1 and shape[0] == shape_of(weight)[-1] and node.op_type == "MatMul" else None


Seen = Layer | Slice | Turned
"""A layer, or a part of one."""

Words = Callable[[Value], Value]
