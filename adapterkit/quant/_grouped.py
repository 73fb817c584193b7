"""Read and write weights stored as integers q: w = (q - zero) * scale.

The columns of a weight are divided into groups. Each row has one zero point and one scale per group. When a weight is
quantized again, q = round(w / scale) + zero. Each group has two candidates for its scale. The first is the base's
scale, because the tool that quantized the base may have optimized it. The second is a new scale, computed from the
group's smallest and largest value. The scale with the smaller squared error is used.
"""

from __future__ import annotations

from abc import abstractmethod
from ctypes import c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from ..errors import ShapeMismatch
from ..io.lazy import Lazy, fetch_once
from ..native import loops
from . import DAMAGED, Packed, divided, numbers, steps

if TYPE_CHECKING:
    from . import Array, Merged

BITS = (2, 4, 8)
"""Bit widths at which no value spans two 32-bit words."""


@dataclass(frozen=True, eq=False)
class Grouped(Packed):
    """A weight stored as integers q. Subclasses read q, the zero points and the scales.

    Attributes:
        bits: the number of bits of each integer.
        groups: the number of groups of columns.
        index: a stored tensor with the group index of each column; None if the columns of each group are adjacent.
    """

    groups: int
    index: Lazy | None
    bits: int
    granule: ClassVar[int] = 1
    """Rows are packed in runs that start at multiples of this number, so no 32-bit word has values from two runs."""

    @abstractmethod
    def whole(self, start: int, stop: int) -> Array:
        """Return the integers q of rows `start` to `stop`, as int32 `[rows, columns]`."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> Array | int:
        """Return the zero points of rows `start` to `stop` as int32 `[rows, groups]`, or one int for all groups."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> Array:
        """Return the scales of rows `start` to `stop`, as float32 `[rows, groups]`."""

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        at, zeros = self._group_of(), self.zeros(start, stop)
        q = self.whole(start, stop) - (zeros if isinstance(zeros, int) else zeros[:, at])
        values = q.astype(np.float32) * self.scales(start, stop)[:, at]
        return cast("Array", values.astype(self.dtype.array))

    @property
    def group_size(self) -> int:
        """The number of adjacent columns in each group; the last group may be smaller."""
        return -(-self.shape[-1] // self.groups)

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest possible value of q."""
        return 0, (1 << self.bits) - 1

    @property
    def zero_span(self) -> tuple[int, int]:
        """The smallest and the largest zero point that the format can store."""
        return self.span

    @abstractmethod
    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        """Convert q, zero points and scales of a run of rows to the layouts of the stored tensors.

        The result omits the zero points if the weight does not store them.
        """

    @abstractmethod
    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        """Concatenate the results of `parts` for all runs of rows; return a map from names to whole tensors."""

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        at, fixed = self._group_of(), self._fixed_zero()
        runs = _runs_of(at, self.groups)
        pieces = []
        for start, stop in steps(self.shape, self.granule):
            values, zeros, scales = merged(start, stop), self.zeros(start, stop), self.scales(start, stop)
            rounded_grid = scales, scales.astype(int) * 0 + zeros
            if runs is None:
                again = self._fresh(*_spans(values, at, self.groups), fixed)
                pieces.append(
                    self.parts(*_better(self._on(values, *rounded_grid, at), self._on(values, *again, at), at))
                )
                continue
            ordered = values[:, runs].reshape(len(values), self.groups, -1)
            fresh = self._fresh(np.minimum(ordered.min(2), 0), np.maximum(ordered.max(2), 0), fixed)
            pieces.append(self.parts(*self._of_runs(ordered, rounded_grid, fresh, runs)))
        return self.named(pieces)

    def _of_runs(
        self, ordered: Array, stored_grid: tuple[Array, Array], fresh: tuple[Array, Array], runs: Array | slice
    ) -> tuple[Array, Array, Array]:
        """Choose between the candidates. Use the compiled loop if it supports the input, and `_better` otherwise.

        All groups must have the same size. `ordered` is `[rows, groups, columns of a group]`.
        """
        import numpy as np

        chosen = _by_library(ordered, stored_grid, fresh, self.span)
        if chosen is None:
            at = np.repeat(np.arange(self.groups), ordered.shape[2])
            values = ordered.reshape(len(ordered), -1)
            chosen = _better(self._on(values, *stored_grid, at), self._on(values, *fresh, at), at)
        q = np.empty_like(chosen[0])
        q[:, runs] = chosen[0]
        return q, *chosen[1:]

    def _fixed_zero(self) -> int | None:
        """Return the zero point that all groups share, as in symmetric quantization; None if the zero points differ."""
        zeros = self.zeros(0, self.shape[0])
        if isinstance(zeros, int):
            return zeros
        return int(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else None

    def _fresh(self, least: Array, most: Array, fixed: int | None) -> tuple[Array, Array]:
        """Compute new scales and zero points from the results of `_spans`.

        If `fixed` is not None, it is the zero point of all groups.
        """
        import numpy as np

        low, high = self.span
        if fixed is not None:
            scale = self.kept(np.maximum(-least, most) * np.float32(2 / (high - low)))
            return scale, np.full(scale.shape, fixed)
        scale = self.kept((most - least) / np.float32(high - low))
        return scale, np.clip(low + np.rint(divided(-least, scale)), *self.zero_span).astype(int)

    @abstractmethod
    def kept(self, scales: Array) -> Array:
        """Return scales rounded to their stored dtype, in float32."""

    def _on(self, values: Array, scales: Array, zeros: Array, at: Array) -> _Grid:
        import numpy as np

        q = np.clip(np.rint(divided(values, scales[:, at])) + zeros[:, at], *self.span).astype(np.int32)
        errors = np.zeros((self.groups, len(values)))
        np.add.at(errors, at, ((q - zeros[:, at]) * scales[:, at] - values).T.astype(float) ** 2)
        return _Grid(q, zeros, scales, errors.T)

    def _group_of(self) -> Array:
        import numpy as np

        columns = self.shape[-1]
        if self.index is None:
            return np.arange(columns) // self.group_size
        at = numbers(self.index)
        if at.size != columns or ((at < 0) | (at >= self.groups)).any():
            why = f"the group index needs {columns} entries, each at least 0 and below {self.groups}"
            raise ShapeMismatch(why, where=self.name, cure=DAMAGED)
        return at


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Rows quantized with one candidate for scales and zero points. `errors` is the squared error per row and group."""

    q: Array
    zeros: Array
    scales: Array
    errors: Array


def _better(one: _Grid, other: _Grid, at: Array) -> tuple[Array, Array, Array]:
    """For each row and group, choose the candidate with the smaller error. Return its q, zero points and scales."""
    import numpy as np

    other_wins = other.errors < one.errors
    pairs = ((one.zeros, other.zeros), (one.scales, other.scales))
    zeros, scales = (np.where(other_wins, b, a) for a, b in pairs)
    return np.asarray(np.where(other_wins[:, at], other.q, one.q)), zeros, scales


def _spans(values: Array, at: Array, groups: int) -> tuple[Array, Array]:
    """Return the smallest and the largest value of each row and group, as if each group also contained a 0."""
    import numpy as np

    least, most = (np.zeros((groups, len(values)), np.float32) for _ in range(2))
    np.minimum.at(least, at, values.T)
    np.maximum.at(most, at, values.T)
    return least.T, most.T


def _runs_of(at: Array, groups: int) -> Array | slice | None:
    """Return an index that sorts the columns by group; None if the groups have different sizes."""
    import numpy as np

    counts = np.bincount(at, minlength=groups)
    if (counts != counts[0]).any():
        return None
    return slice(None) if (np.diff(at) >= 0).all() else np.argsort(at, kind="stable")


def _by_library(
    ordered: Array, stored_grid: tuple[Array, Array], fresh: tuple[Array, Array], span: tuple[int, int]
) -> tuple[Array, Array, Array] | None:
    """Compute q, zero points and scales with the compiled loop; return None if the loop does not support the input."""
    import numpy as np

    loaded = loops()
    kinds = {ordered.dtype, stored_grid[0].dtype, fresh[0].dtype}
    if loaded is None or kinds != {np.dtype(np.float32)} or not np.isfinite(ordered).all():
        return None
    rows, groups, size = ordered.shape
    scales = [np.ascontiguousarray(grid[0]) for grid in (stored_grid, fresh)]
    zeros = [np.ascontiguousarray(grid[1], np.int32) for grid in (stored_grid, fresh)]
    given, q = np.ascontiguousarray(ordered), np.empty((rows, groups * size), np.int32)
    second = np.empty((rows, groups), np.uint8)
    pointers = [(c_void_p * 2)(*(array.ctypes.data for array in pair)) for pair in (scales, zeros)]
    if loaded.adapterkit_grids(
        given.ctypes.data, rows * groups, size, *pointers, *span, q.ctypes.data, second.ctypes.data
    ):
        return None
    return q, np.where(second, fresh[1], stored_grid[1]), np.where(second, fresh[0], stored_grid[0])


def words(q: Array, bits: int) -> Array:
    """Pack integers of `bits` bits into int32 words along the last axis, lowest bits first.

    If the last word is not full, it is padded with zeros.
    """
    import numpy as np

    per = 32 // bits
    full = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, -q.shape[-1] % per)]).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    split = (full & np.uint32((1 << bits) - 1)).reshape(*q.shape[:-1], -1, per) << shifts
    return np.asarray(np.bitwise_or.reduce(split, axis=-1).view(np.int32))


def unpacked(words: Array, bits: int, count: int | None = None) -> Array:
    """Unpack unsigned integers of `bits` bits (to int32) from 32-bit words along the last axis, lowest bits first."""
    import numpy as np

    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    split = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return split.reshape(*words.shape[:-1], -1)[..., :count].astype(np.int32)


def whole(tensor: Lazy) -> Array:
    """Read a whole stored tensor, for layouts in which the elements of a row of the weight are not adjacent."""
    import numpy as np

    return np.frombuffer(fetch_once(tensor), dtype=tensor.dtype.array).reshape(tensor.shape)
