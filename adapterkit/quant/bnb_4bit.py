"""bitsandbytes' nf4 and fp4, with or without double quantization: sixteen levels, scaled by each block's maximum.

w = code[q] * absmax[block]. Blocks are runs of the flat weight, and the first of two weights is in the high half of its
byte. With double quantization, absmax = nested_code[q'] * nested_absmax[block'] + offset. Dettmers et al. 2023, QLoRA,
arXiv:2305.14314

Requantized, q is the level nearest to w / absmax. The second quantization keeps its offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from ..errors import Malformed, ShapeMismatch
from ..io.lazy import BY_TORCH, Lazy
from ..io.strict_json import load_json
from ..native import loops
from ._scheme import DAMAGED, Packed, Scheme, divided, expect, finite, halves, joined, nibbles, numbers, part_of, steps

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ._scheme import Array, Merged

STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 1 << 16


class Bnb4bit(Scheme):
    """`<weight>` as bytes; beside it `.absmax`, `.quant_map`, `.nested_*` and the state, JSON text stored as bytes."""

    url = "https://huggingface.co/docs/bitsandbytes/main/en/reference/nn/linear4bit"
    description = "bitsandbytes nf4 and fp4, with and without double quantization"
    oracle = "bitsandbytes"

    def detect(self, base: Checkpoint) -> bool:
        return any(STATE in name for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if STATE in name:
                yield _weight(base, *name.split(STATE, 1))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Scales of runs of elements: plain floats, or bytes that index a table and are themselves scaled in runs."""

    stored: Lazy
    name: str
    size: int
    table: Lazy | None = None
    above: _Blocks | None = None
    offset: float = 0.0

    def of(self, first: int, stop: int) -> Array:
        """Return the scales of blocks `first` to `stop`, float32."""
        import numpy as np

        values = numbers(self.stored, first, stop - first)
        if self.table is None or self.above is None:
            return finite(values, self.name)
        scaled = finite(numbers(self.table), self.name)[values] * self.above.each(first, stop)
        return finite(scaled + np.float32(self.offset), self.name)

    def each(self, first: int, stop: int) -> Array:
        """Return the scale of every element from `first` to `stop`."""
        import numpy as np

        start, end = first // self.size, -(-stop // self.size)
        return np.repeat(self.of(start, end), self.size)[first - start * self.size :][: stop - first]

    def pack(self, scales: Array) -> dict[str, Array]:
        """Return the stored parts for other scales."""
        import numpy as np

        if self.table is None or self.above is None:
            return {self.name: scales}
        q, largest = quantized(
            scales - np.float32(self.offset), finite(numbers(self.table), self.name), self.above.size
        )
        return {self.name: q, self.above.name: largest}


@dataclass(frozen=True, eq=False)
class _Levels(Packed):
    stored: Lazy
    code: Lazy
    absmax: _Blocks

    @cached_property
    def levels(self) -> Array:
        return finite(numbers(self.code), self.name)

    def rows(self, start: int, stop: int) -> Array:
        width = self.shape[-1]
        first, end = start * width, stop * width
        pairs = numbers(self.stored, first // 2, -(-end // 2) - first // 2)
        q = nibbles(pairs, high_first=True)[first % 2 :][: end - first]
        values = self.levels[q] * self.absmax.each(first, end)
        return cast("Array", values.astype(self.dtype.array).reshape(stop - start, width))

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        size = math.lcm(self.absmax.size, 2)
        granule = size // math.gcd(size, self.shape[-1])
        pieces = [self._packed(merged(start, stop)) for start, stop in steps(self.shape, granule)]
        stored, scales = joined(pieces, (0, 0))
        return {self.members[0]: np.asarray(stored), **self.absmax.pack(scales)}

    def _packed(self, values: Array) -> tuple[Array, Array]:
        import numpy as np

        q, scales = quantized(values.reshape(-1), self.levels, self.absmax.size)
        return halves(np.append(q, q[:0] if len(q) % 2 == 0 else q[:1] * 0), high_first=True), scales


def quantized(values: Array, levels: Array, size: int) -> tuple[Array, Array]:
    """Divide each block of `size` by its largest number; return the nearest levels' indices and these numbers."""
    import numpy as np

    order = np.argsort(levels, kind="stable")
    middles = (levels[order][1:] + levels[order][:-1]) / 2
    blocks = np.pad(values, (0, -len(values) % size)).reshape(-1, size)
    compiled = _by_library(blocks, middles, order)
    if compiled is not None:
        return compiled[0][: len(values)], compiled[1]
    largest = np.abs(blocks).max(1)
    scaled = np.clip(blocks * divided(np.ones_like(largest), largest)[:, None], -1, 1).reshape(-1)[: len(values)]
    return order[np.searchsorted(middles, scaled)].astype(np.uint8), largest


def _by_library(blocks: Array, middles: Array, order: Array) -> tuple[Array, Array] | None:
    """Return the same by the compiled loop; None if it is not there, or does not know these numbers."""
    import numpy as np

    loaded = loops()
    known = blocks.dtype == middles.dtype == np.float32 and len(order) == 16 and np.isfinite(blocks).all()
    if loaded is None or not known:
        return None
    given, middles = np.ascontiguousarray(blocks), np.ascontiguousarray(middles)
    places = order.astype(np.uint8)
    q, largest = np.empty(blocks.size, np.uint8), np.empty(len(blocks), np.float32)
    arrays = (array.ctypes.data for array in (middles, places, q, largest))
    loaded.adapterkit_levels(given.ctypes.data, *blocks.shape, *arrays)
    # float32 has no reciprocal of a smaller number.
    return None if ((largest > 0) & (largest < 2.0**-126)).any() else (q, largest)


def _weight(base: Checkpoint, name: str, kind: str) -> Packed:
    stored = part_of(base, name, name, ("U8", "BF16", "F16", "F32"))
    key = f"{name}{STATE}{kind}"
    state = _state(part_of(base, name, key, ("U8",)), key)
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    if stored.nbytes != -(-count // 2):
        raise ShapeMismatch(f"{stored.nbytes} bytes for {count} weights of 4 bits", where=name, cure=DAMAGED)
    stored = Lazy((stored.nbytes,), BYTES, stored.source, stored.span)
    code = part_of(base, name, f"{name}.quant_map", ("F32",))
    expect(code.shape, (16,), f"{name}.quant_map")
    absmax, names = _absmax(base, name, state, -(-count // size))
    members = (name, key, f"{name}.quant_map", *names)
    return _Levels(name, shape, BY_TORCH[state["dtype"]], members, stored, code, absmax)


BYTES = BY_TORCH["uint8"]


def _absmax(base: Checkpoint, name: str, state: dict[str, Any], blocks: int) -> tuple[_Blocks, tuple[str, ...]]:
    """Return the scales of a weight, and the names of the tensors that hold them."""
    key, size = f"{name}.absmax", state["blocksize"]
    nested = state.get("nested_blocksize")
    stored = part_of(base, name, key, ("F32",) if nested is None else ("U8",))
    expect(stored.shape, (blocks,), key)
    if nested is None:
        return _Blocks(stored, key, size), (key,)
    table_key, above_key = f"{name}.nested_quant_map", f"{name}.nested_absmax"
    table, above = (part_of(base, name, k, ("F32",)) for k in (table_key, above_key))
    expect(table.shape, (256,), table_key)
    expect(above.shape, (-(-blocks // nested),), above_key)
    scales = _Blocks(stored, key, size, table, _Blocks(above, above_key, nested), state["nested_offset"])
    return scales, (key, table_key, above_key)


def _state(stored: Lazy, key: str) -> dict[str, Any]:
    if stored.nbytes > LARGEST_STATE:
        raise Malformed(f"{stored.nbytes} bytes of quantization state", where=key, cure=DAMAGED)
    try:
        state = load_json(bytes(stored.fetch()).decode())
        json.dumps(state, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid JSON ({error})", where=key, cure=DAMAGED) from None
    fault = _fault(state)
    if fault is not None:
        raise Malformed(fault, where=key, cure=DAMAGED)
    return cast("dict[str, Any]", state)


def _fault(state: object) -> str | None:
    if not isinstance(state, dict):
        return "not an object"
    shape = state.get("shape")
    if not isinstance(shape, list) or not shape or not all(_counts(n) for n in shape):
        return f"shape {shape!r} is not one of a weight"
    if not _counts(state.get("blocksize")):
        return f"blocksize {state.get('blocksize')!r} is not a positive number"
    if state.get("dtype") not in ("bfloat16", "float16", "float32"):
        return f"dtype {state.get('dtype')!r} is not bfloat16, float16 or float32"
    nested = state.get("nested_blocksize")
    if nested is not None and not (_counts(nested) and isinstance(state.get("nested_offset"), (int, float))):
        return "nested_blocksize and nested_offset do not describe a second quantization"
    return None


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 48
