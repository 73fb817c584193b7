"""Layers as onnxruntime's tools write them: fused ones, and those that compute with packed weights.

Packed numbers stay unchanged. A branch computes in floating point beside them, on the input before it is quantized.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .building import Array, element_type
from .layers import Layer, MatMul, only_reader
from .operands import attribute, held_apart, is_constant, numbers, shape_of
from .values import Value


class FusedMatMul(MatMul):
    """`x @ W` with fused transpositions, as in saved optimized sessions."""

    op_type = "FusedMatMul"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = node.op_type == cls.op_type and node.domain == "com.microsoft" and is_constant(node.inputs[1])
        batched = any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB"))
        return plain and not batched and attribute(node, "alpha", 1.0) == 1.0 and len(cls.held_shape(node)) == 2

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return not attribute(node, "transB", 0)

    def op(self, x: Value, w: Value) -> Value:
        return super().op(x.mT if attribute(self.node, "transA", 0) else x, w)


class MatMulNBits(Layer):
    """`x @ W.T` with `W` `[N, K]` in `bits`-bit blocks along K, each with a scale and perhaps a zero point."""

    op_type = "MatMulNBits"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        known = node.op_type == cls.op_type and node.domain == "com.microsoft" and len(node.inputs) > 2
        plain = known and all(is_constant(one) for one in node.inputs[1:] if one is not None)
        # Input 4 is `g_idx`, which assigns columns to groups; layers with it are not read.
        ordered = len(node.inputs) < 5 or node.inputs[4] is None
        return plain and ordered and attribute(node, "bits", 4) in (2, 4, 8)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @classmethod
    def held_shape(cls, node: ir.Node) -> tuple[int, ...]:
        return int(attribute(node, "N", 0)), int(attribute(node, "K", 0))

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        given = [None if one is None else held_apart(one) for one in node.inputs[1:4]]
        words = {name: held.value for name, held in node.attributes.items()}
        copy = ir.node(cls.op_type, [None, *given], words, domain=node.domain)
        return lambda: cls.held(copy)

    @classmethod
    def held(cls, node: ir.Node) -> Array:
        (N, K), bits, size = cls.held_shape(node), attribute(node, "bits", 4), attribute(node, "block_size", 32)
        given = [None if one is None else numbers(one) for one in node.inputs[1:4]]
        packed, scales, zeros = (*given, None)[:3]
        assert packed is not None
        assert scales is not None
        blocks = -(-K // size)
        q = unpacked(packed.reshape(N, -1), bits).reshape(N, blocks, size).astype(np.float32)
        if zeros is None:
            # Without zero points, the middle of the range stands for 0.
            zero: Any = np.float32(1 << (bits - 1))
        elif zeros.dtype == np.uint8:
            zero = unpacked(zeros.reshape(N, -1), bits)[:, :blocks, None].astype(np.float32)
        else:
            zero = zeros.reshape(N, blocks, 1).astype(np.float32)
        W: Array = ((q - zero) * scales.reshape(N, blocks, 1).astype(np.float32)).reshape(N, -1)[:, :K]
        return W

    @property
    def dtype(self) -> np.dtype[Any]:
        scales = self.node.inputs[2]
        assert scales is not None
        return element_type(scales)

    @property
    def own_bias(self) -> ir.Value | None:
        return self.node.inputs[5] if len(self.node.inputs) > 5 else None


class MatMulInteger(Layer):
    """`Mul(Cast(MatMulInteger(quantized x, W8)), scales)`, as dynamic quantization writes it."""

    op_type = "MatMulInteger"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = super().takes(node) and len(shape_of(node.inputs[1])) == 2  # type: ignore[arg-type]
        return plain and _quantizer(node) is not None and _scaled(node) is not None

    @classmethod
    def held(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        given, zero = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
        assert given is not None
        packed, scale = held_apart(given), held_apart(product_behind(node)[0])
        zeros = None if zero is None else held_apart(zero)

        def make() -> Array:
            q = numbers(packed).astype(np.float32)
            W: Array = (q - (0 if zeros is None else numbers(zeros).astype(np.float32))) * numbers(scale)
            return W

        return make

    @property
    def read(self) -> ir.Value:
        quantizer = _quantizer(self.node)
        assert quantizer is not None
        assert quantizer.inputs[0] is not None
        return quantizer.inputs[0]

    @property
    def result(self) -> ir.Value:
        found = _scaled(self.node)
        assert found is not None
        return found[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        found = _scaled(self.node)
        assert found is not None
        kind: np.dtype[Any] = numbers(found[1]).dtype
        return kind


def unpacked(rows: Array, bits: int) -> Array:
    """Unpack numbers of a few bits, lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each: Array = (rows[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return each.reshape(len(rows), -1)


def product_behind(node: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Return the weight's scales of a MatMulInteger, and the Mul that multiplies its result by them."""
    found = _scaled(node)
    assert found is not None
    mul = found[0].producer()
    assert mul is not None
    return found[1], mul


def _quantizer(node: ir.Node) -> ir.Node | None:
    """Return the DynamicQuantizeLinear that a MatMulInteger reads, or None."""
    source = None if node.inputs[0] is None else node.inputs[0].producer()
    return source if source is not None and source.op_type == "DynamicQuantizeLinear" else None


def _scaled(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return a MatMulInteger's output after cast and scales, and the weight's scales; None for another pattern."""
    quantizer, cast = _quantizer(node), only_reader(node.outputs[0], "Cast")
    mul = None if cast is None else only_reader(cast.outputs[0], "Mul")
    if quantizer is None or cast is None or mul is None:
        return None
    scales = mul.inputs[1 - list(mul.inputs).index(cast.outputs[0])]
    product = None if scales is None else scales.producer()
    if product is None or product.op_type != "Mul":
        return None
    of_weight = [one for one in product.inputs if one is not quantizer.outputs[1]]
    if len(of_weight) != 1 or of_weight[0] is None or not is_constant(of_weight[0]):
        return None
    return mul.outputs[0], of_weight[0]
