"""Pack changed weights again, in their original scheme.

Scales and zero points are chosen by the same code that requantizes any base; see `adapterkit/quant/_grouped.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..merging.requantize import damage_of
from .building import Array, Building
from .changes import Change, Stored, exchange, lazily, settled_from, unturned
from .grids import Numbers, Seen, joined_bits, numbers_in, split, unknown
from .operands import attribute, numbers, shape_of
from .packed import MatMulInteger, MatMulNBits, product_behind
from .resolving import Spot
from .unpacking import drop


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """How a layer's weight is packed.

    Attributes:
        stored: the tensor, and whether the layer sees it transposed.
        shape: the stored weight's shape.
        numbers: its integers, zero points and scales, as rows.
        rows: converts a weight in stored order to rows.
        put: gives the layer other integers, zero points and scales.
    """

    stored: Stored
    shape: tuple[int, ...]
    numbers: Numbers
    rows: Callable[[Array], Array]
    put: Callable[[Numbers], None]

    def again(self, change: Change) -> dict[str, float]:
        """Pack a changed weight and give it to the layer; return the error, see `damage_of`."""
        merged = self.rows(change.array()).astype(np.float32)
        found = self.numbers.with_numbers(self.numbers.pack(lambda start, stop: merged[start:stop]))
        self.put(found)
        count = len(merged)
        M, W, R = (array.astype(float) for array in (merged, self.numbers.rows(0, count), found.rows(0, count)))
        return damage_of([float(np.linalg.norm(difference)) for difference in (R - M, M, M - W, R - W)])

    def source(self, spot: Spot) -> Any:
        """Return the dequantized numbers in stored order, float32."""
        make = spot.kind.detached(spot.node) if spot.kind in (MatMulNBits, MatMulInteger) else None
        value = self.stored.value
        made = make or (lambda: numbers(value))
        return lazily(lambda: np.asarray(made()).astype(np.float32), self.shape, ir.DataType.FLOAT)


def packing_of(spot: Spot, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    """Return how a layer's weight is packed.

    Raises:
        Unsupported: the scheme is unknown.
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
    raise unknown(spot.node)


def _in_bits(node: ir.Node, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    (N, K), bits, size = MatMulNBits.held_shape(node), attribute(node, "bits", 4), attribute(node, "block_size", 32)
    blocks, given = -(-K // size), [*node.inputs[1:4], None][:3]
    packed, scale = numbers(given[0]), numbers(given[1])  # type: ignore[arg-type]
    zero: Any = 1 << (bits - 1)
    if given[2] is not None:
        stored = numbers(given[2])
        if stored.dtype != np.uint8:
            raise unknown(node)
        zero = split(stored.reshape(N, -1), bits)[:, :blocks]
    q = split(packed.reshape(N, -1), bits)
    found = numbers_in(node, q, zero, scale.reshape(N, blocks), (0, (1 << bits) - 1), bits)

    def put(new: Numbers) -> None:
        arrays = [joined_bits(new.q, bits).reshape(packed.shape), new.scale.reshape(scale.shape)]
        if not isinstance(new.zero, int):
            arrays.append(joined_bits(new.zero, bits).reshape(stored.shape))
        for at, array in enumerate(arrays, 1):
            node.replace_input_with(at, _value(building, fresh, node.inputs[at], array))

    def rows(W: Array) -> Array:
        return np.pad(W, ((0, 0), (0, blocks * size - K)))

    return Packing(Stored(given[0], False, ()), (N, K), found, rows, put)  # type: ignore[arg-type]


def _in_integers(node: ir.Node, building: Building, fresh: dict[Any, ir.Value]) -> Packing:
    held, scale, mul = node.inputs[1], *product_behind(node)
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    assert held is not None
    seen = Seen(shape_of(held), numbers(scale), len(shape_of(held)) - 1, 0)

    def put(new: Numbers) -> None:
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
    seen = Seen(held.shape, scale, attribute(node, "axis", 1) % held.ndim, attribute(node, "block_size", 0))

    def put(new: Numbers) -> None:
        arrays = [seen.back(new.q), seen.small(new.scale, scale)]
        arrays += [] if zero is None else [seen.small(new.zero, zero)]
        values = [_value(building, fresh, one, array) for one, array in zip(given, arrays, strict=False)]
        _copied(spot, node, stored, values, building)

    return Packing(stored, held.shape, seen.numbers_of(spot.node, held, zero), seen.rows, put)


def _in_product(
    spot: Spot, node: ir.Node, stored: Stored, building: Building, fresh: dict[Any, ir.Value]
) -> Packing:  # fmt: skip
    """`Cast(q) * scale`: 8-bit weights stored without quantization operators."""
    cast = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    made_by = None if cast is None else cast.producer()
    scale = next((v for v in node.inputs if v is not None and v is not cast and v.const_value is not None), None)
    held = made_by.inputs[0] if made_by is not None and made_by.op_type == "Cast" else None
    if made_by is None or scale is None or held is None or held.const_value is None:
        raise unknown(spot.node)
    q, factors = numbers(held), numbers(scale)
    sizes = (1,) * (q.ndim - factors.ndim) + factors.shape
    axes = [axis for axis, size in enumerate(sizes) if size != 1]
    if len(axes) > 1 or q.dtype.kind not in "iu":
        raise unknown(spot.node)
    seen = Seen(q.shape, factors, axes[0] if axes else 0, 0)

    def put(new: Numbers) -> None:
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
    """Connect a layer to a copy of its dequantizing node, because others may read the original."""
    out = ir.Value(name=building.name(f"{node.outputs[0].name}.merged"), type=node.outputs[0].type)
    out.shape = node.outputs[0].shape
    words = {name: one.value for name, one in node.attributes.items()}
    copy = ir.node(node.op_type, inputs, words, outputs=[out], name=building.name(f"{node.name}.merged"))
    copy.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, copy)  # type: ignore[union-attr]
    exchange(spot.node, spot.kind.position, stored, out, building)
    drop(node)


def _value(building: Building, fresh: dict[Any, ir.Value], old: ir.Value | None, array: Array) -> ir.Value:
    """Return a new tensor in place of an old one and in its dtype; nodes with equal numbers share it."""
    assert old is not None
    assert old.const_value is not None
    kind = old.const_value.dtype
    held = np.ascontiguousarray(array.astype(kind.numpy()))
    # By content, so that layers which share a tensor and get equal numbers share the new one, too.
    key = ("packed", building.keep(old), hashlib.sha256(held.tobytes()).digest())
    if key not in fresh:
        name = building.name(f"{old.name}.merged")
        tensor = ir.Tensor(held, dtype=kind, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        settled_from(building, fresh, value, old, key)
    return fresh[key]
