"""Packed weights packed again, in the scheme that they were in.

Scales and zero points are chosen by the formula that packs any base again; see `adapterkit/quant/_grouped.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from ..merging.requantize import damage_of
from ..quant._grouped import Grouped
from ..quant._scheme import joined
from ..tensors.dtypes import DTYPES
from .building import Array, Building
from .changes import Change, Stored, exchange, lazily, settled_from, unturned
from .operands import attribute, numbers, shape_of
from .packed import MatMulInteger, MatMulNBits, product_behind, unpacked
from .resolving import Spot
from .unpacking import drop


@dataclass(frozen=True, eq=False)
class _Numbers(Grouped):
    """A weight seen as `[rows, columns]`, in groups of columns."""

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

    def with_numbers(self, found: Mapping[str, Array]) -> _Numbers:
        zero = self.zero if isinstance(self.zero, int) else found["zero"]
        return replace(self, q=found["q"], zero=zero, scale=found["scale"].astype(self.scale.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """How a layer's weight is packed.

    Attributes:
        stored: where it lies and whether the layer sees it turned.
        shape: of the weight as it lies.
        numbers: its whole numbers, zero points and scales, as rows.
        rows: a weight as it lies -> rows.
        put: has the layer take other whole numbers, zero points and scales.
    """

    stored: Stored
    shape: tuple[int, ...]
    numbers: _Numbers
    rows: Callable[[Array], Array]
    put: Callable[[_Numbers], None]

    def again(self, change: Change) -> dict[str, float]:
        """Packs a changed weight and puts it in; returns what that did to it, see `damage_of`."""
        merged = self.rows(change.array()).astype(np.float32)
        found = self.numbers.with_numbers(self.numbers.pack(lambda start, stop: merged[start:stop]))
        self.put(found)
        count = len(merged)
        M, W, R = (array.astype(float) for array in (merged, self.numbers.rows(0, count), found.rows(0, count)))
        return damage_of([float(np.linalg.norm(difference)) for difference in (R - M, M, M - W, R - W)])

    def source(self, spot: Spot) -> Any:
        """The dequantized numbers, as it lies, in float32."""
        make = spot.kind.detached(spot.node) if spot.kind in (MatMulNBits, MatMulInteger) else None
        value = self.stored.value
        made = make or (lambda: numbers(value))
        return lazily(lambda: np.asarray(made()).astype(np.float32), self.shape, ir.DataType.FLOAT)


def packing_of(spot: Spot, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    """How a layer's weight is packed.

    Raises:
        Unsupported: in no way that is known here.
    """
    if spot.kind is MatMulNBits:
        return _in_bits(spot.node, building, fresh)
    if spot.kind is MatMulInteger:
        return _in_integers(spot.node, building, fresh)
    stored = unturned(spot.node.inputs[spot.kind.position])  # type: ignore[arg-type]
    node = stored.value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return _in_linear(spot, node, stored, building, fresh)
    if node is not None and node.op_type == "Mul":
        return _in_product(spot, node, stored, building, fresh)
    raise _unknown(spot.node)


def _unknown(node: ir.Node) -> Unsupported:
    why = "a weight that is packed in a way that is not known here"
    return Unsupported(why, where=node.name, cure="Merge with quantized='dequantize'")


def _in_bits(node: ir.Node, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    (N, K), bits, size = MatMulNBits.held_shape(node), attribute(node, "bits", 4), attribute(node, "block_size", 32)
    blocks, given = -(-K // size), [*node.inputs[1:4], None][:3]
    packed, scale = numbers(given[0]), numbers(given[1])  # type: ignore[arg-type]
    zero: Any = 1 << (bits - 1)
    if given[2] is not None:
        stored = numbers(given[2])
        if stored.dtype != np.uint8:
            raise _unknown(node)
        zero = _split(stored.reshape(N, -1), bits)[:, :blocks]
    q = _split(packed.reshape(N, -1), bits)
    found = _numbers(node, q, zero, scale.reshape(N, blocks), (0, (1 << bits) - 1), bits)

    def put(new: _Numbers) -> None:
        arrays = [_joined(new.q, bits).reshape(packed.shape), new.scale.reshape(scale.shape)]
        if not isinstance(new.zero, int):
            arrays.append(_joined(new.zero, bits).reshape(stored.shape))
        for at, array in enumerate(arrays, 1):
            node.replace_input_with(at, _value(building, fresh, node.inputs[at], array))

    def rows(W: Array) -> Array:
        return np.pad(W, ((0, 0), (0, blocks * size - K)))

    return Packing(Stored(given[0], False, ()), (N, K), found, rows, put)  # type: ignore[arg-type]


def _in_integers(node: ir.Node, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    held, scale, mul = node.inputs[1], *product_behind(node)
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    assert held is not None
    seen = _Seen(shape_of(held), numbers(scale), len(shape_of(held)) - 1, 0)

    def put(new: _Numbers) -> None:
        node.replace_input_with(1, _value(building, fresh, held, seen.back(new.q)))
        if zero is not None:
            node.replace_input_with(3, _value(building, fresh, zero, seen.small(new.zero, numbers(zero))))
        fresh_scale = _value(building, fresh, scale, seen.small(new.scale, numbers(scale)))
        product = next(v.producer() for v in mul.inputs if v is not None and v.producer().op_type == "Mul")  # type: ignore[union-attr]
        assert product is not None
        inputs = [fresh_scale if one is scale else one for one in product.inputs]
        copy = ir.node("Mul", inputs, name=building.name(f"{product.name}.merged"))
        mul.graph.insert_before(mul, copy)  # type: ignore[union-attr]
        mul.replace_input_with(list(mul.inputs).index(product.outputs[0]), copy.outputs[0])
        copy.outputs[0].name = building.name(f"{copy.name}_output")
        drop(product)

    found = seen.numbers_of(node, numbers(held), None if zero is None else numbers(zero))
    return Packing(Stored(held, False, ()), shape_of(held), found, seen.rows, put)


def _in_linear(
    spot: Spot, node: ir.Node, stored: Stored, building: Building, fresh: dict[Any, ir.Value]
) -> Packing:  # fmt: skip
    given = [*node.inputs, None][:3]
    held, scale, zero = (None if one is None else numbers(one) for one in given)
    assert held is not None
    assert scale is not None
    seen = _Seen(held.shape, scale, attribute(node, "axis", 1) % held.ndim, attribute(node, "block_size", 0))

    def put(new: _Numbers) -> None:
        arrays = [seen.back(new.q), seen.small(new.scale, scale)]
        arrays += [] if zero is None else [seen.small(new.zero, zero)]
        values = [_value(building, fresh, one, array) for one, array in zip(given, arrays, strict=False)]
        _copied(spot, node, stored, values, building)

    return Packing(stored, held.shape, seen.numbers_of(spot.node, held, zero), seen.rows, put)


def _in_product(
    spot: Spot, node: ir.Node, stored: Stored, building: Building, fresh: dict[Any, ir.Value]
) -> Packing:  # fmt: skip
    """`Cast(q) * scale`, as weights are stored in 8 bits without operators of their own."""
    cast = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    made_by = None if cast is None else cast.producer()
    scale = next((v for v in node.inputs if v is not None and v is not cast and v.const_value is not None), None)
    held = made_by.inputs[0] if made_by is not None and made_by.op_type == "Cast" else None
    if made_by is None or scale is None or held is None or held.const_value is None:
        raise _unknown(spot.node)
    q, factors = numbers(held), numbers(scale)
    sizes = (1,) * (q.ndim - factors.ndim) + factors.shape
    axes = [axis for axis, size in enumerate(sizes) if size != 1]
    if len(axes) > 1 or q.dtype.kind not in "iu":
        raise _unknown(spot.node)
    seen = _Seen(q.shape, factors, axes[0] if axes else 0, 0)

    def put(new: _Numbers) -> None:
        out = ir.Value(name=building.name(f"{held.name}.merged/Cast_output"), type=cast.type)  # type: ignore[union-attr]
        words = {name: one.value for name, one in made_by.attributes.items()}
        again = ir.node("Cast", [_value(building, fresh, held, seen.back(new.q))], words, outputs=[out])
        again.name = building.name(f"{made_by.name}.merged")
        node.graph.insert_before(node, again)  # type: ignore[union-attr]
        factor = _value(building, fresh, scale, seen.small(new.scale, factors))
        inputs = [out if one is cast else factor for one in node.inputs]
        _copied(spot, node, stored, inputs, building)

    return Packing(stored, q.shape, seen.numbers_of(spot.node, q, None), seen.rows, put)


def _copied(spot: Spot, node: ir.Node, stored: Stored, inputs: list[ir.Value], building: Building) -> None:
    """Has a layer read a copy of the node that dequantizes its weight: others may read that one."""
    out = ir.Value(name=building.name(f"{node.outputs[0].name}.merged"), type=node.outputs[0].type)
    out.shape = node.outputs[0].shape
    words = {name: one.value for name, one in node.attributes.items()}
    copy = ir.node(node.op_type, inputs, words, outputs=[out], name=building.name(f"{node.name}.merged"))
    copy.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, copy)  # type: ignore[union-attr]
    exchange(spot.node, spot.kind.position, stored, out, building)
    drop(node)


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """A tensor of whole numbers as rows, in which scales have runs of columns.

    Attributes:
        shape: of the tensor.
        scale: its scales as they are stored: one, one a channel, or one a block.
        axis: along which scales differ.
        block: how many numbers along the axis share one; 0 for channels.
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
        """Scales or zero points -> `[rows, groups]`."""
        if self.block:
            return np.moveaxis(small, self.axis, -1).reshape(-1, small.shape[self.axis])
        return np.broadcast_to(small.reshape(-1, 1), (self.scale.size, 1))

    def small(self, wide: Array | int, like: Array) -> Array:
        """And back, as one that is stored."""
        if isinstance(wide, int):
            return like
        if not self.block:
            return wide.reshape(-1)[: like.size].reshape(like.shape).astype(like.dtype)
        rest = [size for axis, size in enumerate(like.shape) if axis != self.axis]
        return np.moveaxis(wide.reshape(*rest, like.shape[self.axis]), -1, self.axis).astype(like.dtype)

    def numbers_of(self, node: ir.Node, q: Array, zero: Array | None) -> _Numbers:
        limits = import_module("ml_dtypes").iinfo(q.dtype)
        uneven = self.block and self.shape[self.axis] % self.block
        if uneven or (zero is not None and zero.size not in (1, self.scale.size)) or (zero is None and limits.min == 0):
            raise _unknown(node)
        zeros: Any = 0 if zero is None else self.wide(zero.astype(np.int32))
        one_for_all = zero is not None and zero.size == 1 < self.scale.size
        if one_for_all:
            zeros = int(zero.reshape(-1)[0])  # type: ignore[union-attr]
        bits = int(limits.max - limits.min).bit_length()
        span = (int(limits.min), int(limits.max))
        return _numbers(node, self.rows(q.astype(np.int32)), zeros, self.wide(self.scale), span, bits)


def _numbers(node: ir.Node, q: Array, zero: Any, scale: Array, limits: tuple[int, int], bits: int) -> _Numbers:
    return _Numbers(
        node.name or "", q.shape, DTYPES["F32"], (), scale.shape[1], None, bits, q, zero, scale, limits
    )  # fmt: skip


def _value(building: Building, fresh: dict[Any, ir.Value], old: ir.Value | None, array: Array) -> ir.Value:
    """A tensor in an old one's place, in its type."""
    assert old is not None
    assert old.const_value is not None
    kind = old.const_value.dtype
    name = building.name(f"{old.name}.merged")
    tensor = ir.Tensor(np.ascontiguousarray(array.astype(kind.numpy())), dtype=kind, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
    return settled_from(building, fresh, value, old)


def _split(rows: Array, bits: int) -> Array:
    return unpacked(rows, bits).astype(np.int32)


def _joined(rows: Array, bits: int) -> Array:
    """Numbers of a few bits in bytes, the lowest bits first; rows are filled up with zeros."""
    per = 8 // bits
    full = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per))).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = np.bitwise_or.reduce(full.reshape(len(full), -1, per) << shifts, axis=-1)
    return packed
