"""Layers with packed integer weights: read them, convert them to floating point, or pack changed weights again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from ..io.lazy import DTYPES
from ..merging.quantized import WHY
from ..merging.requantize import damage_of
from ..quant import joined
from ..quant._grouped import Grouped
from .building import Array, Branch, Building, Dtype, element_type, takes_over
from .changes import Fresh, Stored, StoredChange, exchange, lazily, settled_from, unturned
from .fused_nodes import Attention
from .integer_layers import IntegerLayer, in_module_of, initializer
from .layers import Conv, GraphLayer, MatMul, dequantized, only_reader
from .operands import attribute, detached_copy, is_constant, numbers, shape_of
from .values import Value

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from .resolved import Spot


@dataclass(frozen=True, eq=False)
class PackedNumbers(Grouped):
    """A packed weight as `[rows, columns]`; each group of columns in a row has a scale and a zero point."""

    q: Array
    zero: Array | int
    scale: Array
    limits: tuple[int, int]

    @property
    def span(self) -> tuple[int, int]:
        return self.limits

    def whole(self, start: int, stop: int) -> Array:
        return self.q[start:stop].astype(np.int32)

    def zeros(self, start: int, stop: int) -> Array | int:
        return self.zero if isinstance(self.zero, int) else self.zero[start:stop].astype(np.int32)

    def scales(self, start: int, stop: int) -> Array:
        return self.scale[start:stop].astype(np.float32)

    def _fixed_zero(self) -> int | None:
        middle = (sum(self.limits) + 1) // 2
        return self.zero if isinstance(self.zero, int) else middle if (self.zero == middle).all() else None

    def kept(self, scales: Array) -> Array:
        kept: Array = scales.astype(self.scale.dtype).astype(np.float32)
        return kept

    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        return q, zeros, scales

    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        return dict(zip(("q", "zero", "scale"), joined(pieces, (0, 0, 0)), strict=True))

    def with_numbers(self, fields: Mapping[str, Array]) -> PackedNumbers:
        zero = self.zero if isinstance(self.zero, int) else fields["zero"]
        return replace(self, q=fields["q"], zero=zero, scale=fields["scale"].astype(self.scale.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """How to arrange an integer tensor as a matrix in which each row, or each group of columns in a row, has one scale.

    Attributes:
        shape: the tensor's shape.
        scale: the stored scales: one for the tensor, one per channel, or one per block.
        axis: the axis along which the scales differ.
        block: the number of successive elements along the axis that share a scale; 0 if the scales have no blocks.
    """

    shape: tuple[int, ...]
    scale: Array
    axis: int
    block: int

    def rows(self, W: Array) -> Array:
        if self.block:
            return np.moveaxis(W, self.axis, -1).reshape(-1, W.shape[self.axis])
        return W.reshape(1, -1) if self.scale.size == 1 else np.moveaxis(W, self.axis, 0).reshape(self.scale.size, -1)

    def back(self, rows: Array) -> Array:
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        if self.block:
            return np.moveaxis(rows.reshape(*rest, self.shape[self.axis]), -1, self.axis)
        if self.scale.size == 1:
            return rows.reshape(self.shape)
        return np.moveaxis(rows.reshape(self.shape[self.axis], *rest), 0, self.axis)

    def wide(self, small: Array) -> Array:
        """Convert stored scales or zero points to `[rows, groups]`."""
        if self.block:
            return np.moveaxis(small, self.axis, -1).reshape(-1, small.shape[self.axis])
        return np.broadcast_to(small.reshape(-1, 1), (self.scale.size, 1))

    def small(self, wide: Array | int, like: Array) -> Array:
        """Convert scales or zero points `[rows, groups]` to the shape and dtype of the stored tensor `like`.

        `wide` may be one integer, the zero point of all groups. In this case, return `like` unchanged.
        """
        if isinstance(wide, int):
            return like
        if not self.block:
            return wide.reshape(-1)[: like.size].reshape(like.shape).astype(like.dtype)
        rest = [size for axis, size in enumerate(like.shape) if axis != self.axis]
        return np.moveaxis(wide.reshape(*rest, like.shape[self.axis]), -1, self.axis).astype(like.dtype)

    def numbers_of(self, node: ir.Node, q: Array, zero: Array | None) -> PackedNumbers:
        limits = import_module("ml_dtypes").iinfo(q.dtype)
        # Refuse a shorter last block, because the rows are not padded.
        uneven = self.block and self.shape[self.axis] % self.block
        if uneven or (zero is not None and zero.size not in (1, self.scale.size)) or (zero is None and limits.min == 0):
            raise unknown(node)
        zeros: Any = 0 if zero is None else self.wide(zero.astype(np.int32))
        one_for_all = zero is not None and zero.size == 1 < self.scale.size
        if one_for_all:
            zeros = int(zero.reshape(-1)[0])  # type: ignore[union-attr]
        bits = int(limits.max - limits.min).bit_length()
        span = (int(limits.min), int(limits.max))
        return numbers_in(node, self.rows(q.astype(np.int32)), zeros, self.wide(self.scale), span, bits)


def numbers_in(
    node: ir.Node, q: Array, zero: Array | int, scale: Array, limits: tuple[int, int], bits: int
) -> PackedNumbers:
    """Build a packed weight from integers `[rows, columns]`, and from zero points and scales `[rows, groups]`."""
    return PackedNumbers(
        node.name or "", q.shape, DTYPES["F32"], (), scale.shape[1], None, bits, q, zero, scale, limits
    )  # fmt: skip


def unknown(node: ir.Node) -> Unsupported:
    """Return the error for an unknown packing scheme."""
    why = "the packing scheme of the weight is unknown"
    return Unsupported(why, where=node.name, cure="Merge with --quantized dequantize (quantized='dequantize')")


def split(rows: Array, bits: int) -> Array:
    """Unpack integers of `bits` bits each from bytes to `[rows, columns]`, int32."""
    return unpacked(rows, bits).astype(np.int32)


def joined_bits(rows: Array, bits: int) -> Array:
    """Pack integers of `bits` bits each into bytes, lowest bits first; fill the last byte of each row with zeros."""
    per = 8 // bits
    full = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per))).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = np.bitwise_or.reduce(full.reshape(len(full), -1, per) << shifts, axis=-1)
    return packed


# Layers that onnxruntime's tools write: fused layers, and layers that compute with packed weights.
# An attached adapter leaves the packed weight unchanged. The adapter's nodes compute in floating point, and read the
# layer's input before this input is quantized.
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits


class FusedMatMul(MatMul):
    """`x @ W` with fused transpositions, as in graphs that onnxruntime optimized and saved."""

    op_type = "FusedMatMul"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        plain = node.op_type == cls.op_type and node.domain == "com.microsoft" and is_constant(node.inputs[1])
        batched = any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB"))
        return plain and not batched and attribute(node, "alpha", 1.0) == 1.0 and len(cls.stored_shape(node)) == 2

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return not attribute(node, "transB", 0)

    def op(self, x: Value, w: Value) -> Value:
        if not attribute(self.node, "transA", 0):
            return super().op(x, w)
        # Use a FusedMatMul, not a Transpose: a Transpose needs the number of axes, and optimized graphs do not give it.
        turned = self._of(x, w).mT
        words, domain = {"transA": 1}, "com.microsoft"
        out = self.branch.node("FusedMatMul", [x.value, turned.value], words, x.dtype, None, domain=domain)
        return Value(self.branch, None, x.dtype, out)


class MatMulNBits(GraphLayer):
    """`x @ W.T` with `W` as `[N, K]`, packed in blocks along K; each block has a scale and perhaps a zero point."""

    op_type = "MatMulNBits"
    vector = 5

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        known = node.op_type == cls.op_type and node.domain == "com.microsoft" and len(node.inputs) > 2
        plain = known and all(is_constant(one) for one in node.inputs[1:] if one is not None)
        # Refuse layers with input 4, `g_idx`, which assigns columns to groups.
        ordered = len(node.inputs) < 5 or node.inputs[4] is None
        return plain and ordered and attribute(node, "bits", 4) in (2, 4, 8)

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @classmethod
    def stored_shape(cls, node: ir.Node) -> tuple[int, ...]:
        return int(attribute(node, "N", 0)), int(attribute(node, "K", 0))

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        given = [None if one is None else detached_copy(one) for one in node.inputs[1:4]]
        words = {name: attribute_.value for name, attribute_ in node.attributes.items()}
        copy = ir.node(cls.op_type, [None, *given], words, domain=node.domain)
        return lambda: cls.stored_array(copy)

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        (N, K), bits, size = cls.stored_shape(node), attribute(node, "bits", 4), attribute(node, "block_size", 32)
        given = [None if one is None else numbers(one) for one in node.inputs[1:4]]
        packed, scales, zeros = (*given, None)[:3]
        assert packed is not None
        assert scales is not None
        blocks = -(-K // size)
        q = unpacked(packed.reshape(N, -1), bits).reshape(N, blocks, size).astype(np.float32)
        if zeros is None:
            # Without zero points, the integer in the middle of the range stands for 0.
            zero: Any = np.float32(1 << (bits - 1))
        elif zeros.dtype == np.uint8:
            zero = unpacked(zeros.reshape(N, -1), bits)[:, :blocks, None].astype(np.float32)
        else:
            zero = zeros.reshape(N, blocks, 1).astype(np.float32)
        W: Array = ((q - zero) * scales.reshape(N, blocks, 1).astype(np.float32)).reshape(N, -1)[:, :K]
        return W

    @property
    def dtype(self) -> Dtype:
        scales = self.node.inputs[2]
        assert scales is not None
        return element_type(scales)


class MatMulInteger(GraphLayer):
    """`Mul(Cast(MatMulInteger(quantized x, W8)), scales)`, the nodes that dynamic quantization writes for a layer."""

    op_type = "MatMulInteger"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return super().takes(node) and _quantizer(node) is not None and _scaled(node) is not None

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        given, zero = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
        assert given is not None
        packed, scale = detached_copy(given), detached_copy(product_behind(node)[0])
        zeros = None if zero is None else detached_copy(zero)

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
        scaled = _scaled(self.node)
        assert scaled is not None
        return scaled[0]

    @property
    def dtype(self) -> Dtype:
        scaled = _scaled(self.node)
        assert scaled is not None
        kind: Dtype = numbers(scaled[1]).dtype
        return kind


class ConvInteger(MatMulInteger, Conv):
    """A dynamically quantized convolution, with the same nodes as `MatMulInteger`; an Add of the bias may follow."""

    op_type = "ConvInteger"
    vector = None

    @property
    def stated_bias(self) -> ir.Value | None:
        added = self.added(self.node)
        return None if added is None else added[1]

    @property
    def result(self) -> ir.Value:
        added = self.added(self.node)
        return super().result if added is None else added[0].outputs[0]

    @classmethod
    def added(cls, node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
        """Return the Add of the bias that follows the convolution, and the bias; None if no such Add follows."""
        scaled = _scaled(node)
        assert scaled is not None
        y, shape = scaled[0], cls.stored_shape(node)
        add = only_reader(y, "Add")
        b = None if add is None else add.inputs[1 - list(add.inputs).index(y)]
        if add is None or b is None or not is_constant(b):
            return None
        spread = [shape[0], *[1] * (len(shape) - 2)]
        sizes = list(shape_of(b))
        return (add, b) if sizes in (spread, [1, *spread]) else None


def unpacked(rows: Array, bits: int) -> Array:
    """Unpack integers of `bits` bits each from bytes, lowest bits first, to `[rows, columns]`, uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each: Array = (rows[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return each.reshape(len(rows), -1)


def product_behind(node: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Return the scales of a MatMulInteger's weight, and the Mul that dequantizes the MatMulInteger's output."""
    scaled = _scaled(node)
    assert scaled is not None
    mul = scaled[0].producer()
    assert mul is not None
    return scaled[1], mul


def _quantizer(node: ir.Node) -> ir.Node | None:
    """Return the DynamicQuantizeLinear that a MatMulInteger reads, or None."""
    source = None if node.inputs[0] is None else node.inputs[0].producer()
    return source if source is not None and source.op_type == "DynamicQuantizeLinear" else None


def _scaled(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return the dequantized output of a MatMulInteger, and the scales of its weight.

    Return None if the nodes do not match the pattern in the docstring of the class `MatMulInteger`, or if the scales of
    the weight are not constant.
    """
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


# The choices for packed weights, and the conversion of packed layers to floating point for a merge.


CHOICES = {choice: WHY[choice] for choice in ("dequantize", "requantize")}
"""Map from each value of a merge's argument `quantized` to its meaning."""

EXPLAINED = (
    "Choose: (1) keep_change='float' (--keep-change float): keep the weight unchanged, and store the change beside it "
    "as floating-point factors; (2) quantized='dequantize' (--quantized dequantize): fold the change into the "
    "dequantized weight, and write a floating-point layer; (3) quantized='requantize' (--quantized requantize): "
    "quantize the changed weight again in the same scheme, and report how much of the change is left"
)

KEEPING = {
    "float": "keep each packed weight unchanged, and store its change beside it as floating-point factors",
    "packed": "quantize each changed weight again, however much of the change is lost",
}
"""Map from each value of a merge's argument `keep_change` to its meaning."""

MOST_LOST = 0.05
"""The largest fraction of a change that may be lost when the changed weight is quantized again. By default, if more
would be lost, the change is stored beside the unchanged weight."""

PACKED = re.compile(r"(?:_quantized|_q|(?:_DQ)?_Q\d)$")
"""Suffixes that quantizers append to the name of a weight."""


def is_packed(spot: Spot) -> bool:
    """Whether a layer's weight is stored as integers."""
    kinds = [(one.const_value or one, one) for one in spot.sources]
    return any(
        value.dtype is not None and not value.dtype.is_floating_point() and len(shape_of(one)) > 1
        for value, one in kinds
    )


def as_float(spot: Spot, building: Building, fresh: Fresh) -> Spot:
    """Convert a packed layer, its input and its output to floating point; return the new layer."""
    layer = spot.kind(spot.node, Branch(building, "dequantize"))
    kind = _floating(spot.kind)
    value = _unpacked(spot, layer, kind, building, fresh)
    node = _plain_operands(spot, layer, value) if kind is None else _plain_node(layer, value)
    kind = kind or spot.kind
    first, second, *rest = shape_of(value)
    shape = (second, first, *rest) if kind.turns(node) else (first, second, *rest)
    return replace(spot, node=node, kind=kind, sources=(value,), shape=shape)


def _floating(kind: type[GraphLayer]) -> type[GraphLayer] | None:
    """Return the kind of float layer that replaces a packed layer; None if the node itself computes in floats."""
    if issubclass(kind, IntegerLayer):
        return kind.floating
    if issubclass(kind, ConvInteger):
        return Conv
    return MatMul if issubclass(kind, MatMulNBits | MatMulInteger) else None


def _plain_operands(spot: Spot, layer: GraphLayer, value: ir.Value) -> ir.Node:
    """Remove the QuantizeLinear and DequantizeLinear nodes at a node's weight, input and output; return the node."""
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


def _unpacked(
    spot: Spot, layer: GraphLayer, plain: type[GraphLayer] | None, building: Building, fresh: Fresh
) -> ir.Value:
    """Return the dequantized weight, whose data are computed only when the model is written.

    Layers that share a packed weight also share the dequantized weight.
    """
    operand = layer.operand
    inputs = [id(operand), *(id(one) for one in spot.node.inputs[2:])]
    key: Hashable = tuple(inputs) if plain is not None else id(operand)
    if key not in fresh:
        make, kind = spot.kind.detached(spot.node), ir.DataType.from_numpy(layer.dtype)
        # `plain` may store a weight in another axis order than the packed layer.
        shape = spot.kind.stored_shape(spot.node)
        turn = plain is not None and spot.kind.turns(spot.node) != issubclass(plain, MatMul | Attention)
        name = building.name(PACKED.sub("", spot.sources[0].name or "weight"))
        sizes = ir.Shape(shape[::-1] if turn else shape)

        def worked_out() -> ir.TensorProtocol:
            W = np.asarray(make()).astype(kind.numpy(), copy=False)
            return ir.Tensor(np.ascontiguousarray(W.T if turn else W), dtype=kind, name=name)

        tensor = ir.LazyTensor(worked_out, kind, sizes, cache=False, name=name)
        fresh[key] = ir.Value(name=name, shape=sizes, type=ir.TensorType(kind), const_value=tensor)
        building.model.graph.register_initializer(fresh[key])
        # Keep the operand alive: its id is in a key of `fresh`, and Python reuses the ids of deleted objects.
        building.keep(operand)
    return fresh[key]


def _plain_node(layer: GraphLayer, value: ir.Value) -> ir.Node:
    """Replace a node that computes with packed weights by floating-point nodes; return the first of these nodes."""
    branch, graph, last = layer.branch, layer.node.graph, layer.result.producer()
    assert graph is not None
    assert last is not None
    if isinstance(layer, IntegerLayer):
        y = layer.in_floats(value)
    else:
        b, inputs, words = layer.constant_bias, [layer.read, value], None
        if isinstance(layer, Conv):
            words = {name: attribute_.value for name, attribute_ in layer.node.attributes.items()}
            if b is not None:
                inputs.append(initializer(branch.building, f"{layer.node.name}.bias", numbers(b).reshape(-1)))
        y = branch.node("Conv" if isinstance(layer, Conv) else "MatMul", inputs, words, layer.dtype, None)
        if b is not None and not isinstance(layer, Conv):
            y = branch.node("Add", [y, b], None, layer.dtype, None)
    node = branch.nodes[0]
    in_module_of(layer.node, branch)
    graph.insert_after(last, branch.nodes)
    _replaced(layer.result, y, branch)
    node.name = layer.node.name
    return node


def _replaced(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Replace all uses of `old` with `new`, and remove the nodes that become unused."""
    if old is new:
        return
    takes_over(old, new, branch)
    drop(old.producer())


def drop(node: ir.Node | None) -> None:
    """Remove a node if its outputs are unused, and then the nodes before it whose outputs became unused."""
    if node is None or node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    before = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for one in before:
        drop(one)


# Pack changed weights again in their original scheme.
#
# `adapterkit/quant/_grouped.py` chooses the scales and zero points, both here and for bases that are not ONNX files.


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """How a layer's weight is packed.

    Attributes:
        stored: the stored tensor, and whether the layer reads it transposed.
        shape: the stored weight's shape.
        numbers: the weight as rows of integers, with their zero points and scales.
        rows: a function that converts a weight in its stored axis order to the rows of `numbers`.
        put: a function that replaces the layer's integers, zero points and scales by new packed numbers.
    """

    stored: Stored
    shape: tuple[int, ...]
    numbers: PackedNumbers
    rows: Callable[[Array], Array]
    put: Callable[[PackedNumbers], None]

    def tried(self, change: StoredChange) -> tuple[PackedNumbers, dict[str, float]]:
        """Pack a changed weight; return the packed numbers and their error (see `damage_of`)."""
        merged = self.rows(change.array()).astype(np.float32)
        packed = self.numbers.with_numbers(self.numbers.pack(lambda start, stop: merged[start:stop]))
        count = len(merged)
        M, W, R = (array.astype(float) for array in (merged, self.numbers.rows(0, count), packed.rows(0, count)))
        return packed, damage_of([float(np.linalg.norm(difference)) for difference in (R - M, M, M - W, R - W)])

    def source(self, spot: Spot) -> Lazy:
        """Return the dequantized weight in its stored axis order, float32."""
        make = None if _floating(spot.kind) is None else spot.kind.detached(spot.node)
        value = self.stored.value
        read = make or (lambda: numbers(value))
        return lazily(lambda: np.asarray(read()).astype(np.float32), self.shape, ir.DataType.FLOAT)


def packing_of(spot: Spot, building: Building, fresh: Fresh) -> Packing:
    """Return how a layer's weight is packed.

    Raises:
        Unsupported: the scheme is unknown.
    """
    if spot.kind is MatMulNBits:
        return _in_bits(spot.node, building, fresh)
    if issubclass(spot.kind, MatMulInteger):
        return _in_integers(spot.node, building, fresh)
    if issubclass(spot.kind, IntegerLayer):
        return _in_operator(spot.kind(spot.node, Branch(building, "requantize")), building, fresh)
    stored = unturned(spot.node.inputs[spot.kind.position])  # type: ignore[arg-type]
    node = stored.value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return _in_linear(spot, node, stored, building, fresh)
    if node is not None and node.op_type == "Mul":
        return _in_product(spot, node, stored, building, fresh)
    raise unknown(spot.node)


def _in_bits(node: ir.Node, building: Building, fresh: Fresh) -> Packing:
    (N, K), bits, size = MatMulNBits.stored_shape(node), attribute(node, "bits", 4), attribute(node, "block_size", 32)
    blocks, given = -(-K // size), [*node.inputs[1:4], None][:3]
    packed, scale = numbers(given[0]), numbers(given[1])  # type: ignore[arg-type]
    zero: Any = 1 << (bits - 1)
    zeros_shape: tuple[int, ...] = ()
    if given[2] is not None:
        stored = numbers(given[2])
        zeros_shape = stored.shape
        if stored.dtype != np.uint8:
            raise unknown(node)
        zero = split(stored.reshape(N, -1), bits)[:, :blocks]
    q = split(packed.reshape(N, -1), bits)
    packed_numbers = numbers_in(node, q, zero, scale.reshape(N, blocks), (0, (1 << bits) - 1), bits)

    def put(new: PackedNumbers) -> None:
        arrays = [joined_bits(new.q, bits).reshape(packed.shape), new.scale.reshape(scale.shape)]
        if not isinstance(new.zero, int):
            arrays.append(joined_bits(new.zero, bits).reshape(zeros_shape))
        for at, array in enumerate(arrays, 1):
            node.replace_input_with(at, replaced(building, fresh, node.inputs[at], array))

    def rows(W: Array) -> Array:
        return np.pad(W, ((0, 0), (0, blocks * size - K)))

    return Packing(Stored(given[0], False, ()), (N, K), packed_numbers, rows, put)  # type: ignore[arg-type]


def _in_integers(node: ir.Node, building: Building, fresh: Fresh) -> Packing:
    stored, scale, mul = node.inputs[1], *product_behind(node)
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    assert stored is not None
    seen = Seen(shape_of(stored), numbers(scale), len(shape_of(stored)) - 1, 0)

    def put(new: PackedNumbers) -> None:
        node.replace_input_with(1, replaced(building, fresh, stored, seen.back(new.q)))
        if zero is not None:
            node.replace_input_with(3, replaced(building, fresh, zero, seen.small(new.zero, numbers(zero))))
        fresh_scale = replaced(building, fresh, scale, seen.small(new.scale, numbers(scale)))
        product = next(v.producer() for v in mul.inputs if v is not None and v.producer().op_type == "Mul")  # type: ignore[union-attr]
        assert product is not None
        inputs = [fresh_scale if one is scale else one for one in product.inputs]
        copy = ir.node("Mul", inputs, name=building.name(f"{product.name}.merged"))
        mul.graph.insert_before(mul, copy)  # type: ignore[union-attr]
        mul.replace_input_with(list(mul.inputs).index(product.outputs[0]), copy.outputs[0])
        copy.outputs[0].name = building.name(f"{copy.name}_output")
        drop(product)

    packed = seen.numbers_of(node, numbers(stored), None if zero is None else numbers(zero))
    return Packing(Stored(stored, False, ()), shape_of(stored), packed, seen.rows, put)


def _in_operator(layer: IntegerLayer, building: Building, fresh: Fresh) -> Packing:
    stored, scale, zero = layer.stored(layer.node)
    assert stored is not None
    assert scale is not None
    seen = Seen(shape_of(stored), numbers(scale), layer.axis(layer.node), 0)

    def put(new: PackedNumbers) -> None:
        values = [replaced(building, fresh, stored, seen.back(new.q))]
        values.append(replaced(building, fresh, scale, seen.small(new.scale, numbers(scale))))
        if zero is not None:
            values.append(replaced(building, fresh, zero, seen.small(new.zero, numbers(zero))))
        layer.put(values)

    packed = seen.numbers_of(layer.node, numbers(stored), None if zero is None else numbers(zero))
    return Packing(Stored(stored, False, ()), shape_of(stored), packed, seen.rows, put)


def _in_linear(
    spot: Spot, node: ir.Node, stored: Stored, building: Building, fresh: Fresh
) -> Packing:  # fmt: skip
    given = [*node.inputs, None][:3]
    codes, scale, zero = (None if one is None else numbers(one) for one in given)
    assert codes is not None
    assert scale is not None
    seen = Seen(codes.shape, scale, attribute(node, "axis", 1) % codes.ndim, attribute(node, "block_size", 0))

    def put(new: PackedNumbers) -> None:
        arrays = [seen.back(new.q), seen.small(new.scale, scale)]
        arrays += [] if zero is None else [seen.small(new.zero, zero)]
        values = [replaced(building, fresh, one, array) for one, array in zip(given, arrays, strict=False)]
        _copied(spot, node, stored, values, building)

    return Packing(stored, codes.shape, seen.numbers_of(spot.node, codes, zero), seen.rows, put)


def _in_product(
    spot: Spot, node: ir.Node, stored: Stored, building: Building, fresh: Fresh
) -> Packing:  # fmt: skip
    """Return the packing of `Cast(q) * scale`: integer weights that are dequantized without a DequantizeLinear."""
    cast = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    made_by = None if cast is None else cast.producer()
    scale = next((v for v in node.inputs if v is not None and v is not cast and v.const_value is not None), None)
    codes = made_by.inputs[0] if made_by is not None and made_by.op_type == "Cast" else None
    if made_by is None or scale is None or codes is None or codes.const_value is None:
        raise unknown(spot.node)
    q, factors = numbers(codes), numbers(scale)
    sizes = (1,) * (q.ndim - factors.ndim) + factors.shape
    axes = [axis for axis, size in enumerate(sizes) if size != 1]
    if len(axes) > 1 or q.dtype.kind not in "iu":
        raise unknown(spot.node)
    seen = Seen(q.shape, factors, axes[0] if axes else 0, 0)

    def put(new: PackedNumbers) -> None:
        out = ir.Value(name=building.name(f"{codes.name}.merged/Cast_output"), type=cast.type)  # type: ignore[union-attr]
        words = {name: one.value for name, one in made_by.attributes.items()}
        again = ir.node("Cast", [replaced(building, fresh, codes, seen.back(new.q))], words, outputs=[out])
        again.name = building.name(f"{made_by.name}.merged")
        node.graph.insert_before(node, again)  # type: ignore[union-attr]
        factor = replaced(building, fresh, scale, seen.small(new.scale, factors))
        inputs = [out if one is cast else factor for one in node.inputs]
        _copied(spot, node, stored, inputs, building)

    return Packing(stored, q.shape, seen.numbers_of(spot.node, q, None), seen.rows, put)


def _copied(spot: Spot, node: ir.Node, stored: Stored, inputs: list[ir.Value], building: Building) -> None:
    """Connect a layer to a copy of its dequantizing node, because other nodes may read the original."""
    out = ir.Value(name=building.name(f"{node.outputs[0].name}.merged"), type=node.outputs[0].type)
    out.shape = node.outputs[0].shape
    words = {name: one.value for name, one in node.attributes.items()}
    copy = ir.node(node.op_type, inputs, words, outputs=[out], name=building.name(f"{node.name}.merged"))
    copy.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, copy)  # type: ignore[union-attr]
    exchange(spot.node, spot.kind.position, stored, out, building)
    drop(node)


def replaced(building: Building, fresh: Fresh, old: ir.Value | None, array: Array) -> ir.Value:
    """Return a new tensor that has the values of `array` and the dtype of `old`, to replace `old`.

    If several layers replace the same `old` with equal arrays, they share the new tensor too.
    """
    assert old is not None
    assert old.const_value is not None
    kind = old.const_value.dtype
    data = np.ascontiguousarray(array.astype(kind.numpy()))
    # The key contains a hash of the new values. So layers that shared `old` share the new tensor if the values agree.
    key = ("packed", building.keep(old), hashlib.sha256(data.tobytes()).digest())
    if key not in fresh:
        name = building.name(f"{old.name}.merged")
        tensor = ir.Tensor(data, dtype=kind, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        settled_from(building, fresh, value, old, key)
    return fresh[key]
