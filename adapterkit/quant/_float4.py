"""NVFP4: w = e2m1 * scale * second, with an 8-bit float scale per 16 values and a second scale per tensor.

Two tools write this format. One stores the second scale, the other its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..errors import ShapeMismatch
from ..io.lazy import Lazy
from ._scheme import (
    DAMAGED,
    E2M1,
    Packed,
    divided,
    expect,
    finite,
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
    from ._scheme import Array, Merged

GROUP = 16
TOP, MOST = 6.0, 448.0
"""The largest 4-bit float, and the largest 8-bit scale."""


@dataclass(frozen=True, eq=False)
class Float4(Packed):
    """A weight with two values in each byte, the first in the low half."""

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
        """Keep the second scale, because fused layers share it.

        Compute a new second scale only if a value is too large.
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
    """Return the packed weight of a module.

    Args:
        base: the quantized base.
        module: the path of the module.
        names: the endings of the names of three tensors: packed values, scales, and the second scale.
        divide: True if the tool stores the inverse of the second scale.
    """
    name, members = f"{module}.weight", tuple(f"{module}.{word}" for word in names)
    stored = part_of(base, name, members[0], ("U8",))
    scale = part_of(base, name, members[1], ("F8_E4M3",))
    second = part_of(base, name, members[2], ("F32",))
    if len(stored.shape) != 2 or second.nbytes != 4:
        raise ShapeMismatch(f"the shape {list(stored.shape)} does not have two axes", where=members[0], cure=DAMAGED)
    shape = (stored.shape[0], stored.shape[1] * 2)
    expect(scale.shape, (shape[0], shape[1] // GROUP), members[1])
    inputs = tuple(n for w in ("input_scale", "input_global_scale") if (n := f"{module}.{w}") in base.tensors)
    return Float4(name, shape, sixteen_bits(base), (*members, *inputs), stored, scale, second, divide)
