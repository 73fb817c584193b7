"""bitsandbytes' int8: w = q * SCB[row] / 127; SCB is the row's largest magnitude.

Dettmers et al. 2022, arXiv:2208.07339
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..errors import Unsupported
from ..io.lazy import Lazy
from . import (
    Packed,
    Rowwise,
    Scheme,
    divided,
    expect,
    finite,
    from_bytes,
    joined,
    numbers,
    part_of,
    rows_of,
    sixteen_bits,
    steps,
)
from ._conv1d import as_in_base

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array, Merged

ONE_127TH = 7.874015718698502e-3


class BnbInt8(Scheme):
    """A module's tensors are `<module>.weight` in int8 and `<module>.SCB` in float32.

    Outlier columns are not stored, because bitsandbytes finds them at run time.
    """

    url = "https://huggingface.co/docs/bitsandbytes/main/en/reference/nn/linear8bit"
    description = "bitsandbytes LLM.int8(): int8 weights with one scale per row"
    oracle = "bitsandbytes"

    def detect(self, base: Checkpoint) -> bool:
        return any(name.endswith(".SCB") for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if name.endswith(".SCB"):
                yield as_in_base(base, _weight(base, name.removesuffix(".SCB")))


@dataclass(frozen=True, eq=False)
class _Int8Rows(Rowwise):
    stored: Lazy
    scale: Lazy

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        scale = finite(numbers(self.scale, start, stop - start), self.members[1])
        q = rows_of(self.stored, start, stop).astype(np.float32)
        return cast("Array", (q * scale[:, None] * np.float32(ONE_127TH)).astype(self.dtype.array))

    @property
    def apart(self) -> bool:
        return True

    def closed(self, row: int) -> bool:
        return True

    def places(self, row: int) -> dict[str, int]:
        return {self.members[0]: row * self.shape[-1], self.members[1]: row * self.scale.dtype.itemsize}

    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        return {name: part.tobytes() for name, part in zip(self.members, _quantized(rows), strict=False)}

    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        stored = from_bytes(parts[self.members[0]], self.stored.dtype, self.shape[-1])
        scale = from_bytes(parts[self.members[1]], self.scale.dtype)
        return replace(self, shape=stored.shape, stored=stored, scale=scale).rows(0, stored.shape[0])

    def pack(self, merged: Merged) -> dict[str, Array]:
        pieces = [_quantized(merged(start, stop)) for start, stop in steps(self.shape)]
        return dict(zip(self.members[:2], joined(pieces, (0, 0)), strict=True))


def _quantized(values: Array) -> tuple[Array, Array]:
    """Quantize rows by q = round(127 w / SCB), with ties rounded to even; return q and SCB."""
    import numpy as np

    largest = np.abs(values).max(1)
    inverse = divided(np.full_like(largest, 127), largest)
    return np.rint(values * inverse[:, None]).astype(np.int8), largest


def _weight(base: Checkpoint, module: str) -> Packed:
    name, scb, form = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    stored, scale = part_of(base, name, name, ("I8",)), part_of(base, name, scb, ("F32",))
    expect(stored.shape, (*scale.shape, stored.shape[-1]) if stored.shape else scale.shape, name)
    if form in base.tensors and set(bytes(base.tensors[form].read(0, 1))) - {0}:
        cure = "Load the base with transformers and bitsandbytes, and save it again: the new file has rows"
        raise Unsupported("the weights are stored in tiles, not in rows", path=base.root, where=form, cure=cure)
    members = (name, scb, *((form,) if form in base.tensors else ()))
    return _Int8Rows(name, stored.shape, sixteen_bits(base), members, stored, scale)
