"""Layers other than matrix products: convolutions along any number of axes, and embeddings."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from .building import element_type
from .layers import Layer
from .operands import attribute, is_constant
from .values import Value


class Conv(Layer):
    """A convolution along any number of axes, grouped or not."""

    op_type = "Conv"
    axes = range(3, 9)

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
        # The new weight may have another kernel, whose shape ONNX infers without the attribute.
        kept = {name: held.value for name, held in self.node.attributes.items() if name != "kernel_shape"}
        # The weight spans the channels of all groups: convolve without groups.
        if len(w.shape) == len(self.shape) and w.shape[1] != self.shape[1]:
            return self._convolved(x, w, w.shape[0], kept | {"group": 1})
        whole = w.reshape(w.shape[0], *self.shape[1:])
        return self._convolved(x, self.seen(whole), w.shape[0], kept)

    def mix(self, h: Value, w: Value) -> Value:
        w = self._of(h, w)
        # A mix of channels is a convolution with a kernel of size 1.
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
    """A transposed convolution; its weight is stored as `[in, out / groups, *k]`."""

    op_type = "ConvTranspose"

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return True


class Gather(Layer):
    """An embedding: rows of a table `[in, out]`, where a token is an index along `in`."""

    op_type = "Gather"
    position = 0

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = super().takes(node) and attribute(node, "axis", 0) == 0 and not is_constant(node.inputs[1])
        return plain and element_type(node.inputs[0]).kind not in "iub"

    @property
    def read(self) -> ir.Value:
        found = self.node.inputs[1]
        assert found is not None
        return found

    def op(self, x: Value, w: Value) -> Value:
        table = self._of(self.y, w).swapaxes(0, 1)
        sizes = None if x.sizes is None else (*x.sizes, table.shape[1])
        node = self.branch.node("Gather", [table.value, x.value], {"axis": 0}, table.dtype, None)
        return Value(self.branch, sizes, table.dtype, node)
