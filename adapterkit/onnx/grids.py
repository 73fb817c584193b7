"""Integer weights as rows, where runs of columns share scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from ..io.dtypes import DTYPES
from ..quant._grouped import Grouped
from ..quant._scheme import joined
from .building import Array
from .packed import unpacked


@dataclass(frozen=True, eq=False)
class Numbers(Grouped):
    """A weight as `[rows, columns]`, in groups of columns."""

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

    def with_numbers(self, found: Mapping[str, Array]) -> Numbers:
        zero = self.zero if isinstance(self.zero, int) else found["zero"]
        return replace(self, q=found["q"], zero=zero, scale=found["scale"].astype(self.scale.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """How an integer tensor maps to rows, in which each run of columns has one scale.

    Attributes:
        shape: the tensor's shape.
        scale: the stored scales: one, one per channel, or one per block.
        axis: the axis along which scales differ.
        block: how many numbers along the axis share a scale; 0 for channels.
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
        """Convert `[rows, groups]` back to the stored form of `like`."""
        if isinstance(wide, int):
            return like
        if not self.block:
            return wide.reshape(-1)[: like.size].reshape(like.shape).astype(like.dtype)
        rest = [size for axis, size in enumerate(like.shape) if axis != self.axis]
        return np.moveaxis(wide.reshape(*rest, like.shape[self.axis]), -1, self.axis).astype(like.dtype)

    def numbers_of(self, node: ir.Node, q: Array, zero: Array | None) -> Numbers:
        limits = import_module("ml_dtypes").iinfo(q.dtype)
        # The rows have no padding for a last, shorter block.
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


def numbers_in(node: ir.Node, q: Array, zero: Any, scale: Array, limits: tuple[int, int], bits: int) -> Numbers:
    """Return integers `[rows, columns]` with zero points and scales `[rows, groups]` and the stored type's limits."""
    return Numbers(
        node.name or "", q.shape, DTYPES["F32"], (), scale.shape[1], None, bits, q, zero, scale, limits
    )  # fmt: skip


def unknown(node: ir.Node) -> Unsupported:
    """Return the error for an unknown packing scheme."""
    why = "a weight in an unknown packing scheme"
    return Unsupported(why, where=node.name, cure="Merge with quantized='dequantize'/--quantized dequantize")


def split(rows: Array, bits: int) -> Array:
    """Unpack numbers of a few bits from bytes, `[rows, columns]`, int32."""
    return unpacked(rows, bits).astype(np.int32)


def joined_bits(rows: Array, bits: int) -> Array:
    """Pack numbers of a few bits into bytes, lowest bits first; rows are padded with zeros."""
    per = 8 // bits
    full = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per))).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = np.bitwise_or.reduce(full.reshape(len(full), -1, per) << shifts, axis=-1)
    return packed
