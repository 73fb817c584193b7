"""Weights of 8-bit floats with scales: one for all, one a row, or one a block. Several schemes store them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import ShapeMismatch
from ..tensors.lazy import Lazy, Shape
from ._scheme import DAMAGED, Packed, finite, numbers, rows_of, sixteen_bits

if TYPE_CHECKING:
    import numpy as np

    from ..tensors.checkpoint import Checkpoint

DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """w = q * scale: rows and columns share a scale in blocks of `block`; `grid` is the shape of one expert's scales.

    A grid of a single scale for all experts has `experts` 1.
    """

    stored: Lazy
    scale: Lazy
    block: tuple[int, int]
    grid: tuple[int, int]
    experts: int

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        import numpy as np

        q = rows_of(self.stored, start, stop).astype(np.float32)
        height, width = self.shape[-2:]
        positions = np.arange(start, stop)
        expert = positions // height if self.experts > 1 else 0 * positions
        at = expert * self.grid[0] + positions % height // self.block[0]
        scales = _values(self.scale, int(at[0]), int(at[-1]) + 1, self.grid[1], self.members[1])
        across = np.repeat(scales, self.block[1], axis=1)[:, :width]
        return cast("np.ndarray[Any, Any]", (q * across[at - at[0]]).astype(self.dtype.array))


def scaled(
    base: Checkpoint, name: str, scale_name: str, block: tuple[int, int] | None, others: tuple[str, ...] = ()
) -> Scaled:
    """The packed weight of a stored tensor and its scales.

    Raises:
        ShapeMismatch: the scales are no grid over the weight.
    """
    stored, scale = base.tensors[name], base.tensors[scale_name]
    if scale.dtype.name not in SCALES:
        raise ShapeMismatch(f"scales of dtype {scale.dtype}", path=base.root, where=scale_name, cure=DAMAGED)
    try:
        block, grid, experts = _grid(stored.shape, scale.shape, block)
    except ValueError:
        why = f"scales {list(scale.shape)} are no grid over a weight {list(stored.shape)}"
        why += f" in blocks of {list(block)}" if block else ""
        raise ShapeMismatch(why, path=base.root, where=scale_name, cure=DAMAGED) from None
    members = (name, scale_name, *others)
    return Scaled(name, stored.shape, sixteen_bits(base, scale), members, stored, scale, block, grid, experts)


def _grid(weight: Shape, scale: Shape, block: tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(rows and columns that share a scale, the grid's shape, how many of them there are)."""
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
    if (down, across) != (-(-height // block[0]), -(-width // block[1])):
        raise ValueError
    return block, (down, across), experts


def _values(scale: Lazy, start: int, stop: int, width: int, name: str) -> np.ndarray[Any, Any]:
    """Rows of a grid of scales in float32; whole bytes are exponents of two."""
    import numpy as np

    found = numbers(scale, start * width, (stop - start) * width).reshape(stop - start, width)
    if scale.dtype.name == "U8":
        exponents = np.where(found == 255, np.nan, found.astype(np.float32) - 127)
        found = np.exp2(exponents).astype(np.float32)
    return finite(found, name)
