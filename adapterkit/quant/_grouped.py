"""Whole numbers in groups of columns: w = (q - zero) * scale, one zero and one scale a row and group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import ShapeMismatch
from ..tensors.lazy import Lazy
from ._scheme import DAMAGED, Packed, numbers

if TYPE_CHECKING:
    import numpy as np

BITS = (2, 4, 8)
"""Widths that never straddle two words."""


@dataclass(frozen=True, eq=False)
class Grouped(Packed):
    """A subclass says how whole numbers, zeros and scales of rows are read.

    Attributes:
        groups: how many groups of columns there are.
        index: the group of each column, where columns were reordered; else groups are runs of columns.
    """

    groups: int
    index: Lazy | None

    def whole(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """q of rows, `[rows, columns]`, int32."""
        raise NotImplementedError

    def zeros(self, start: int, stop: int) -> np.ndarray[Any, Any] | int:
        """Zeros of rows, `[rows, groups]`, int32."""
        raise NotImplementedError

    def scales(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Scales of rows, `[rows, groups]`, float32."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        import numpy as np

        at, zeros = self._group_of(), self.zeros(start, stop)
        q = self.whole(start, stop) - (zeros if isinstance(zeros, int) else zeros[:, at])
        values = q.astype(np.float32) * self.scales(start, stop)[:, at]
        return cast("np.ndarray[Any, Any]", values.astype(self.dtype.array))

    def _group_of(self) -> np.ndarray[Any, Any]:
        import numpy as np

        columns = self.shape[-1]
        if self.index is None:
            return np.arange(columns) // -(-columns // self.groups)
        at = numbers(self.index)
        if at.size != columns or ((at < 0) | (at >= self.groups)).any():
            why = f"groups of columns are not all among the {self.groups} there are"
            raise ShapeMismatch(why, where=self.name, cure=DAMAGED)
        return at


def unpacked(words: np.ndarray[Any, Any], bits: int, count: int | None = None) -> np.ndarray[Any, Any]:
    """Unsigned numbers of `bits` bits out of 32-bit words, the lowest first, along the last axis; int32."""
    import numpy as np

    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    split = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return split.reshape(*words.shape[:-1], -1)[..., :count].astype(np.int32)


def whole(tensor: Lazy) -> np.ndarray[Any, Any]:
    """All of a stored tensor."""
    return numbers(tensor, 0, math.prod(tensor.shape)).reshape(tensor.shape)
