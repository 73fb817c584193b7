"""Read and write weights of 8-bit and 4-bit floats. Several schemes use this module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..errors import ShapeMismatch, Unsupported
from ..io.lazy import Lazy, Shape
from . import (
    DAMAGED,
    E2M1,
    STEP,
    Packed,
    Rowwise,
    divided,
    expect,
    finite,
    from_bytes,
    halves,
    joined,
    nearest_e2m1,
    nibbles,
    numbers,
    part_of,
    rows_of,
    sixteen_bits,
    steps,
)

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array, Merged


# Read and write weights of 8-bit floats with one scale per tensor, row or block.


DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


@dataclass(frozen=True, eq=False)
class ScaledFloat8(Rowwise):
    """A weight of 8-bit floats: w = q * scale, with one scale per block of size `block` (rows, columns).

    `grid` is the shape of one expert's grid of scales. `experts` is the number of such grids. It is 1 if the weight has
    no experts, or if all experts share one scale.
    """

    stored: Lazy
    scale: Lazy
    block: tuple[int, int]
    grid: tuple[int, int]
    experts: int

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        q = self._values(start, stop)
        height, width = self.shape[-2:]
        positions = np.arange(start, stop)
        expert = positions // height if self.experts > 1 else 0 * positions
        at = expert * self.grid[0] + positions % height // self.block[0]
        scales = values_of_scales(self.scale, int(at[0]), int(at[-1]) + 1, self.grid[1], self.members[1])
        across = np.repeat(scales, self.block[1], axis=1)[:, :width]
        return cast("Array", (q * across[at - at[0]]).astype(self.dtype.array))

    def _values(self, start: int, stop: int) -> Array:
        """Return rows of q in float32."""
        import numpy as np

        raw = rows_of(self.stored, start, stop)
        # A lookup in a table of all 256 values takes a third of the time of a cast to float32.
        return np.arange(256, dtype=np.uint8).view(raw.dtype).astype(np.float32)[raw.view(np.uint8)]

    def pack(self, merged: Merged) -> dict[str, Array]:
        stored, scale = joined([self._band(merged, start, stop) for start, stop in self._bands()], (0, 0))
        return dict(zip(self.members[:2], (stored, scale), strict=True))

    @property
    def apart(self) -> bool:
        return len(self.shape) == 2 and self.grid[0] > 1

    def closed(self, row: int) -> bool:
        return row % self.block[0] == 0 or row == self.shape[0]

    def places(self, row: int) -> dict[str, int]:
        scales = -(-row // self.block[0]) * self.grid[1] * self.scale.dtype.itemsize
        return dict(zip(self.members, (row * self.shape[1], scales), strict=False))

    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        parts = self._band(lambda first, stop: rows[first - start : stop - start], start, start + len(rows))
        return {name: part.tobytes() for name, part in zip(self.members, parts, strict=False)}

    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        stored = from_bytes(parts[self.members[0]], self.stored.dtype, self.shape[1])
        scale = from_bytes(parts[self.members[1]], self.scale.dtype, self.grid[1])
        grid = (scale.shape[0], self.grid[1])
        return replace(self, shape=stored.shape, stored=stored, scale=scale, grid=grid).rows(0, stored.shape[0])

    def _bands(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of runs of rows. No two runs share a scale.

        If experts have their own scales, each run is within one expert.
        """
        rows = math.prod(self.shape[:-1])
        height = self.shape[-2] if self.experts > 1 else rows
        block = self.block[0] if self.grid[0] > 1 else height
        step = block * max(1, STEP // (max(self.shape[-1], 1) * block))
        for first in range(0, rows, height):
            for start in range(first, first + height, step):
                yield start, min(start + step, first + height)

    def _band(self, merged: Merged, start: int, stop: int) -> tuple[Array, Array]:
        """Quantize a run of rows; return q and the scales.

        Each scale is its block's largest magnitude, divided by the largest 8-bit float.
        """
        import ml_dtypes
        import numpy as np

        runs = list(_runs(start, stop, self.block[0], self.shape[-1]))
        cells = [_largest(merged(*run), self.block) for run in runs]
        largest = np.concatenate(cells) if self.block[0] < stop - start else np.max(cells, axis=0)
        top = float(ml_dtypes.finfo(self.stored.dtype.array).max)  # type: ignore[no-untyped-call]
        scale, value = _rounded(largest / np.float32(top), self.scale)
        pieces = [self._quantized(merged(*run), value, run[0] - start, top) for run in runs]
        return np.concatenate(pieces), scale

    def _quantized(self, values: Array, scale: Array, offset: int, top: float) -> Array:
        import numpy as np

        at = (np.arange(len(values)) + offset) // self.block[0]
        across = np.repeat(scale, self.block[1], axis=1)[np.minimum(at, len(scale) - 1), : values.shape[1]]
        return np.clip(divided(values, across), -top, top).astype(self.stored.dtype.array)


@dataclass(frozen=True, eq=False)
class ScaledFloat4(ScaledFloat8):
    """A weight of 4-bit floats: w = q * scale. Each byte stores two values of q, the first in the low half."""

    def _values(self, start: int, stop: int) -> Array:
        import numpy as np

        return np.array(E2M1, np.float32)[nibbles(rows_of(self.stored, start, stop).view(np.uint8))]

    @property
    def apart(self) -> bool:
        return False

    def pack(self, merged: Merged) -> dict[str, Array]:
        return Packed.pack(self, merged)


def _runs(start: int, stop: int, block: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the rows to read in each step.

    A step reads whole blocks. If a single block has too many rows for one step, a step reads only a part of the block.
    """
    most = max(1, STEP // max(width, 1))
    step = most // block * block or most
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _largest(values: Array, block: tuple[int, int]) -> Array:
    """Return the largest magnitude in each block."""
    import numpy as np

    rows = np.maximum.reduceat(np.abs(values), np.arange(0, values.shape[0], block[0]), axis=0)
    return np.asarray(np.maximum.reduceat(rows, np.arange(0, values.shape[1], block[1]), axis=1))


def _rounded(scale: Array, stored: Lazy) -> tuple[Array, Array]:
    """Round scales to their stored dtype; return them in this dtype and in float32.

    If the dtype stores only powers of two, the scales are rounded up.
    """
    # Round up: with a smaller scale, the block's largest value could exceed the range of 8-bit floats.
    import numpy as np

    if stored.dtype.name in ("U8", "F8_E8M0"):
        exponents = np.clip(np.ceil(np.log2(np.maximum(scale, np.float32(2.0**-126)))), -127, 127)
        return (exponents + 127).astype(np.uint8), np.exp2(exponents).astype(np.float32)
    kept = scale.astype(stored.dtype.array)
    return kept, kept.astype(np.float32)


def scaled(
    base: Checkpoint, name: str, scale_name: str, block: tuple[int, int] | None, others: tuple[str, ...] = ()
) -> ScaledFloat8:
    """Return the packed weight that consists of a stored tensor and its scales.

    Raises:
        ShapeMismatch: the scales do not form a grid over the weight, or have a dtype that is not in `SCALES`.
    """
    stored, scale = base.tensors[name], base.tensors[scale_name]
    # As in transformers, the scales show the blocks of 4-bit floats: the size in the config is for 8-bit floats.
    packed = stored.dtype.name == "I8"
    shape = (*stored.shape[:-1], 2 * stored.shape[-1]) if packed else stored.shape
    if scale.dtype.name not in SCALES:
        why = f"scales of dtype {scale.dtype} are not supported"
        raise ShapeMismatch(why, path=base.root, where=scale_name, cure=DAMAGED)
    try:
        block, grid, experts = _grid(shape, scale.shape, None if packed else block)
        if packed and (shape[-2] % grid[0] or shape[-1] % grid[1]):
            raise ValueError
    except ValueError:
        why = f"scales of shape {list(scale.shape)} do not form a grid over a weight of shape {list(shape)}"
        why += f" in blocks of {list(block)}" if block else ""
        raise ShapeMismatch(why, path=base.root, where=scale_name, cure=DAMAGED) from None
    members = (name, scale_name, *others)
    cls = ScaledFloat4 if packed else ScaledFloat8
    return cls(name, shape, sixteen_bits(base, scale), members, stored, scale, block, grid, experts)


def _grid(weight: Shape, scale: Shape, block: tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return (block size (rows, columns), shape of one expert's scales, number of experts with scales)."""
    *lead, height, width = weight
    experts = math.prod(lead)
    if math.prod(scale) == 1:
        return (height, width), (1, 1), 1
    if scale == (*lead, height) or scale == (*lead, height, 1):
        return (1, width), (height, 1), experts
    if lead and scale in {tuple(lead), (*lead, 1, 1)}:
        return (height, width), (1, 1), experts
    if len(scale) != len(weight) or scale[:-2] != tuple(lead) or 0 in scale:
        raise ValueError
    down, across = scale[-2:]
    if block is None:
        block = (-(-height // down), -(-width // across))
        if height % down or width % across:
            block = (128, 128)
    if min(block) < 1:
        raise ValueError
    if (down, across) != (-(-height // block[0]), -(-width // block[1])):
        raise ValueError
    return block, (down, across), experts


def values_of_scales(scale: Lazy, start: int, stop: int, width: int, name: str) -> Array:
    """Return rows of a grid of scales in float32. If the stored dtype is U8, the byte b means the scale 2^(b - 127)."""
    import numpy as np

    scales = numbers(scale, start * width, (stop - start) * width).reshape(stop - start, width)
    if scale.dtype.name == "U8":
        exponents = np.where(scales == 255, np.nan, scales.astype(np.float32) - 127)
        scales = np.exp2(exponents).astype(np.float32)
    return finite(scales, name)


# NVFP4: w = e2m1 * scale * second. `e2m1` is a 4-bit float, `scale` is an 8-bit float for each group of 16 values, and
# `second` is one float for the whole tensor.
#
# Two tools write this format. ModelOpt stores `second`, and llm-compressor stores 1 / `second`.


GROUP = 16
PRESCALE = "pre_quant_scale"
TOP, MOST = 6.0, 448.0
"""The largest 4-bit float, and the largest 8-bit scale."""


@dataclass(frozen=True, eq=False)
class Float4(Packed):
    """A weight of 4-bit floats (NVFP4). Each byte stores two values, the first in the low half."""

    stored: Lazy
    scale: Lazy
    second: Lazy
    divide: bool

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        second = finite(numbers(self.second), self.members[2])
        scale = finite(rows_of(self.scale, start, stop), self.members[1])
        scale = finite(scale / second if self.divide else scale * second, self.members[2])
        levels = np.array(E2M1, np.float32)[nibbles(rows_of(self.stored, start, stop))]
        return cast("Array", (levels * np.repeat(scale, GROUP, axis=1)).astype(self.dtype.array))

    def pack(self, merged: Merged) -> dict[str, Array]:
        """Quantize the merged weight with the stored scale of the whole tensor, because fused layers share this scale.

        Compute a new scale of the whole tensor only if a value is too large for the stored one.
        """
        import numpy as np

        second = finite(numbers(self.second), self.members[2])
        largest = np.float32(max(float(np.abs(merged(*run)).max()) for run in steps(self.shape)))
        if not largest <= TOP * MOST * (1 / second[0] if self.divide else second[0]):
            second = np.full_like(second, TOP * MOST / largest if self.divide else largest / (TOP * MOST))
        factor = 1 / second if self.divide else second
        pieces = [_quantized(merged(start, stop), factor, self.scale) for start, stop in steps(self.shape)]
        stored, scale = joined(pieces, (0, 0))
        return dict(zip(self.members, (stored, scale, second.reshape(self.second.shape)), strict=False))


def _quantized(values: Array, second: Array, stored: Lazy) -> tuple[Array, Array]:
    import numpy as np

    groups = values.reshape(len(values), -1, GROUP)
    wanted = np.clip(np.abs(groups).max(2) / np.float32(TOP) / second, 0, MOST)
    scale = wanted.astype(stored.dtype.array)
    q = nearest_e2m1(divided(groups, (scale.astype(np.float32) * second)[..., None]))
    return halves(q.reshape(values.shape)), scale


def float4(base: Checkpoint, module: str, names: tuple[str, str, str], *, divide: bool) -> Float4:
    """Return the packed NVFP4 weight of a module.

    Args:
        base: the quantized base.
        module: the path of the module.
        names: the last parts of the names of three tensors: the packed values, the scales and the second scale.
        divide: True if the file stores the inverse of the second scale.
    """
    name, members = f"{module}.weight", tuple(f"{module}.{word}" for word in names)
    if f"{module}.{PRESCALE}" in base.tensors:
        why = "the layer multiplies its inputs by pre_quant_scale, so an adapter's change does not fit the weight"
        cure = "Merge into the 16-bit weights that the base was quantized from"
        raise Unsupported(why, path=base.root, where=f"{module}.{PRESCALE}", cure=cure)
    stored = part_of(base, name, members[0], ("U8",))
    scale = part_of(base, name, members[1], ("F8_E4M3",))
    second = part_of(base, name, members[2], ("F32",))
    if len(stored.shape) != 2 or second.nbytes != 4:
        why = f"the tensor must have two axes (shape: {list(stored.shape)}), and {members[2]} must have one value"
        raise ShapeMismatch(why, where=members[0], cure=DAMAGED)
    shape = (stored.shape[0], stored.shape[1] * 2)
    expect(scale.shape, (shape[0], shape[1] // GROUP), members[1])
    inputs = tuple(n for w in ("input_scale", "input_global_scale") if (n := f"{module}.{w}") in base.tensors)
    return Float4(name, shape, sixteen_bits(base), (*members, *inputs), stored, scale, second, divide)
