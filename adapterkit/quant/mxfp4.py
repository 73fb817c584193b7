"""MXFP4, for gpt-oss's experts: w = e2m1 * 2^(scale - 127). `e2m1` is a 4-bit float; 32 values share one scale.

In OCP Microscaling Formats 1.0, a block's scale is a quarter of the largest power of two that does not exceed the
block's largest magnitude. A merge uses twice this scale if that makes the error smaller. Values are packed along the
inputs; the unpacked experts are `[e, in, out]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..errors import Malformed
from ..io.lazy import DTYPES, Lazy
from . import (
    DAMAGED,
    E2M1,
    Packed,
    Rowwise,
    Scheme,
    expect,
    from_bytes,
    halves,
    joined,
    nearest_e2m1,
    nibbles,
    numbers,
    part_of,
    steps,
)

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array, Merged

GROUP = 32


class Mxfp4(Scheme):
    """`<weight>_blocks` is `[e, out, in/32, 16]`, two values per byte, and `<weight>_scales` is `[e, out, in/32]`.

    The first value of a byte is in the low half.
    """

    url = "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf"
    description = "MXFP4 experts of gpt-oss: 4-bit floats, one power-of-two scale per 32 values"
    oracle = "transformers"

    def detect(self, base: Checkpoint) -> bool:
        return any(name.endswith("_blocks") and name[:-7] + "_scales" in base.tensors for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if name.endswith("_blocks"):
                yield _weight(base, name.removesuffix("_blocks"))


@dataclass(frozen=True, eq=False)
class _Experts(Rowwise):
    stored: Lazy
    scale: Lazy

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        height = self.shape[1]
        pieces = [
            self._of(expert, max(start - expert * height, 0), min(stop - expert * height, height))
            for expert in range(start // height, -(-stop // height))
        ]
        return np.concatenate(pieces)

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        experts, height, _ = self.shape
        packed_parts = []
        for first in range(0, experts * height, height):
            pieces = [quantized(merged(first + a, first + b)) for a, b in steps(self.shape[1:], GROUP)]
            packed_parts.append(joined(pieces, (1, 1)))
        return {
            name: np.stack(parts) for name, parts in zip(self.members, zip(*packed_parts, strict=True), strict=True)
        }

    @property
    def apart(self) -> bool:
        return True

    def closed(self, row: int) -> bool:
        # The file stores all values of an expert's first output, then all values of the second output, and so on. But a
        # row of the weight has the values of one input. So a run of rows must start at the first row of an expert.
        return row % self.shape[1] == 0

    def places(self, row: int) -> dict[str, int]:
        blocks = row // self.shape[1] * math.prod(self.scale.shape[1:])
        return dict(zip(self.members, (blocks * self.stored.shape[3], blocks), strict=True))

    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        experts = replace(self, shape=(len(rows) // self.shape[1], *self.shape[1:]))
        return {name: part.tobytes() for name, part in experts.pack(lambda a, b: rows[a:b]).items()}

    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        stored = from_bytes(parts[self.members[0]], self.stored.dtype, *self.stored.shape[1:])
        scale = from_bytes(parts[self.members[1]], self.scale.dtype, *self.scale.shape[1:])
        experts = stored.shape[0]
        shape = (experts, *self.shape[1:])
        return replace(self, shape=shape, stored=stored, scale=scale).rows(0, experts * self.shape[1])

    def _of(self, expert: int, start: int, stop: int) -> Array:
        """Return inputs `start` to `stop` of one expert, `[inputs, outputs]`."""
        import numpy as np

        _, outs, groups, size = self.stored.shape
        first, end = start // GROUP, -(-stop // GROUP)
        scale = numbers(self.scale, expert * outs * groups, outs * groups).reshape(outs, groups)[:, first:end]
        if (scale == 255).any():
            raise Malformed("a scale is not a finite number", where=self.members[1], cure=DAMAGED)
        count = outs * groups * size
        packed = numbers(self.stored, expert * count, count).reshape(outs, groups, size)[:, first:end]
        levels = np.array(E2M1, np.float32)[nibbles(packed)]
        values = np.ldexp(levels, scale.astype(np.int32)[..., None] - 127).reshape(outs, -1)
        part = values[:, start - first * GROUP : stop - first * GROUP].swapaxes(0, 1)
        return cast("Array", part.astype(self.dtype.array))


def quantized(values: Array) -> tuple[Array, Array]:
    """Quantize `[inputs, outputs]` to blocks `[outputs, groups, 16]` and exponents `[outputs, groups]`.

    The standard's formula for the exponent clips scaled values above 6. If the next larger exponent has a smaller
    squared error, it is used instead. Without this, a small change could clip a block's largest magnitude by a quarter:
    if the magnitude falls just below a power of two, the standard's exponent decreases by 1. The scaled magnitude is
    then almost 8, and it is clipped to 6.
    """
    import numpy as np

    groups = values.swapaxes(0, 1).reshape(values.shape[1], -1, GROUP)
    largest = np.abs(groups).max(2)
    exponents = np.where(largest == 0, -127, np.clip(np.frexp(largest)[1] - 3, -127, 127))
    larger = np.where(largest == 0, -127, np.minimum(exponents + 1, 127))
    (q, error), (other, less) = (_on(groups, each) for each in (exponents, larger))
    wins = less < error
    return halves(np.where(wins[..., None], other, q)), (np.where(wins, larger, exponents) + 127).astype(np.uint8)


def _on(groups: Array, exponents: Array) -> tuple[Array, Array]:
    """Quantize groups with the given exponents; return the codes, and the squared error of each group."""
    import numpy as np

    scaled = np.ldexp(groups, -exponents[..., None])
    q = nearest_e2m1(scaled)
    error = np.square(np.array(E2M1, np.float32)[q] - scaled).sum(2, dtype=np.float64)
    return q, np.ldexp(error, 2 * exponents)


def _weight(base: Checkpoint, name: str) -> Packed:
    stored, scale = (part_of(base, name, f"{name}_{part}", ("U8",)) for part in ("blocks", "scales"))
    if len(stored.shape) != 4:
        raise Malformed(
            f"the tensor has {len(stored.shape)} axes, not 4", path=base.root, where=f"{name}_blocks", cure=DAMAGED
        )
    experts, outs, groups, _ = stored.shape
    expect(stored.shape, (experts, outs, groups, GROUP // 2), f"{name}_blocks")
    expect(scale.shape, (experts, outs, groups), f"{name}_scales")
    members = (f"{name}_blocks", f"{name}_scales")
    return _Experts(name, (experts, groups * GROUP, outs), DTYPES["BF16"], members, stored, scale)
