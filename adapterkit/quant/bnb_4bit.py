"""bitsandbytes' nf4 and fp4, with or without double quantization: w = code[q] * absmax[block].

`code` contains 16 levels, and `absmax` is the block's largest magnitude. A block consists of consecutive elements of
the flattened weight. Each byte contains two elements, the first in the high half. With double quantization,
absmax = nested_code[q'] * nested_absmax[block'] + offset. Dettmers et al. 2023, QLoRA, arXiv:2305.14314

When a weight is quantized again, q is the index of the level nearest to w / absmax, and `offset` stays the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from ..errors import Malformed, ShapeMismatch
from ..io.lazy import BY_TORCH, Lazy, from_numpy
from ..io.strict_json import load_json
from ..native import KINDS, loops
from . import (
    DAMAGED,
    Packed,
    Rowwise,
    Scheme,
    divided,
    expect,
    finite,
    halves,
    joined,
    nibbles,
    numbers,
    part_of,
    steps,
)
from ._conv1d import as_in_base

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array, Merged

STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 1 << 16


class Bnb4bit(Scheme):
    """`<weight>` is stored as bytes, next to `.absmax`, `.quant_map`, `.nested_*` and a quantization state in JSON."""

    url = "https://huggingface.co/docs/bitsandbytes/main/en/reference/nn/linear4bit"
    description = "bitsandbytes nf4 and fp4, with and without double quantization"
    oracle = "bitsandbytes"

    def detect(self, base: Checkpoint) -> bool:
        return any(STATE in name for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if STATE in name:
                yield as_in_base(base, _weight(base, *name.split(STATE, 1)))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The scales of a weight's blocks.

    Without double quantization, the scales are stored as floats. With double quantization, they are stored as indices
    into a table. To read a scale, its table value is multiplied by a second scale (from `above`), and `offset` is
    added.
    """

    stored: Lazy
    name: str
    size: int
    table: Lazy | None = None
    above: _Blocks | None = None
    offset: float = 0.0

    def of(self, first: int, stop: int) -> Array:
        """Return the scales of blocks `first` to `stop` in float32."""
        import numpy as np

        values = numbers(self.stored, first, stop - first)
        if self.table is None or self.above is None:
            return finite(values, self.name)
        scaled = finite(numbers(self.table), self.name)[values] * self.above.each(first, stop)
        return finite(scaled + np.float32(self.offset), self.name)

    def each(self, first: int, stop: int) -> Array:
        """Return the scales of elements `first` to `stop`, one per element."""
        import numpy as np

        start, end = first // self.size, -(-stop // self.size)
        return np.repeat(self.of(start, end), self.size)[first - start * self.size :][: stop - first]

    def pack(self, scales: Array) -> dict[str, Array]:
        """Return the stored tensors for new scales, as a map from names to values.

        With double quantization, the new scales are quantized too, and get new scales of their own.
        """
        import numpy as np

        if self.table is None or self.above is None:
            return {self.name: scales}
        q, largest = quantized(
            scales - np.float32(self.offset), finite(numbers(self.table), self.name), self.above.size
        )
        return {self.name: q, self.above.name: largest}

    def places(self, block: int) -> dict[str, int]:
        """Return, for each stored tensor, the byte offset of the scale of the block with index `block`."""
        if self.above is None:
            return {self.name: 4 * block}
        return {self.name: block, **self.above.places(-(-block // self.above.size))}

    def over(self, parts: Mapping[str, Lazy]) -> _Blocks:
        """Return a copy of these scales that reads the new stored tensors in `parts`."""
        above = None if self.above is None else self.above.over(parts)
        part = parts[self.name]
        stored = Lazy((part.nbytes // self.stored.dtype.itemsize,), self.stored.dtype, part.source)
        return replace(self, stored=stored, above=above)


@dataclass(frozen=True, eq=False)
class _Levels(Rowwise):
    stored: Lazy
    code: Lazy
    absmax: _Blocks

    @cached_property
    def levels(self) -> Array:
        return finite(numbers(self.code), self.name)

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        width = self.shape[-1]
        first, end, size = start * width, stop * width, self.absmax.size
        pairs = numbers(self.stored, first // 2, -(-end // 2) - first // 2)
        if not (first % size or end % size or size % 16) and (loaded := loops()) is not None:
            scales = np.ascontiguousarray(self.absmax.of(first // size, end // size), np.float32)
            levels, out = np.ascontiguousarray(self.levels, np.float32), np.empty(end - first, self.dtype.array)
            given = (array.ctypes.data for array in (levels, scales))
            loaded.adapterkit_from_levels(
                pairs.ctypes.data, len(scales), size, *given, KINDS[self.dtype.name], out.ctypes.data
            )
            return out.reshape(stop - start, width)
        q = nibbles(pairs, high_first=True)[first % 2 :][: end - first]
        values = self.levels[q] * self.absmax.each(first, end)
        return cast("Array", values.astype(self.dtype.array).reshape(stop - start, width))

    @property
    def apart(self) -> bool:
        return True

    @cached_property
    def _granule(self) -> int:
        """The smallest number of elements that fill whole bytes, whole blocks, and whole blocks of scales."""
        return math.lcm(2, self.absmax.size * (1 if self.absmax.above is None else self.absmax.above.size))

    def closed(self, row: int) -> bool:
        count = row * self.shape[-1]
        return count % self._granule == 0 or count == math.prod(self.shape)

    def places(self, row: int) -> dict[str, int]:
        count = row * self.shape[-1]
        return {self.members[0]: -(-count // 2), **self.absmax.places(-(-count // self.absmax.size))}

    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        pairs, scales = packed_levels(rows.reshape(-1), self.levels, self.absmax.size)
        return {name: part.tobytes() for name, part in self._named(pairs, scales).items()}

    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        import numpy as np

        leaves = {name: from_numpy(np.frombuffer(data, np.uint8)) for name, data in parts.items()}
        stored, width = leaves[self.members[0]], self.shape[-1]
        count = min(2 * stored.nbytes // width, self.shape[0])
        shape = (count, width)
        return replace(self, shape=shape, stored=stored, absmax=self.absmax.over(leaves)).rows(0, count)

    def pack(self, merged: Merged) -> dict[str, Array]:
        granule = self._granule // math.gcd(self._granule, self.shape[-1])
        pieces = [
            packed_levels(merged(start, stop).reshape(-1), self.levels, self.absmax.size)
            for start, stop in steps(self.shape, granule)
        ]
        return self._named(*joined(pieces, (0, 0)))

    def _named(self, pairs: Array, scales: Array) -> dict[str, Array]:
        return {self.members[0]: pairs, **self.absmax.pack(scales)}


def packed_levels(values: Array, levels: Array, size: int) -> tuple[Array, Array]:
    """Like `quantized`, but pack two indices into each byte, the first in the high half."""
    import numpy as np

    codes = _by_library(values, levels, size)
    if codes is not None:
        return codes
    q, largest = quantized(values, levels, size)
    return halves(np.append(q, q[:0] if len(q) % 2 == 0 else q[:1] * 0), high_first=True), largest


def quantized(values: Array, levels: Array, size: int) -> tuple[Array, Array]:
    """Quantize blocks of `size` values. Return the index of the nearest level for each value, and each block's scale.

    The scale is the block's largest magnitude. Values are divided by this scale before they are compared with levels.
    """
    import numpy as np

    codes_and_scales = _by_library(values, levels, size)
    if codes_and_scales is not None:
        return (
            nibbles(codes_and_scales[0], high_first=True) if len(levels) == 16 else codes_and_scales[0]
        ), codes_and_scales[1]
    order, middles = _ascending(levels)
    blocks = np.pad(values, (0, -len(values) % size)).reshape(-1, size)
    largest = np.abs(blocks).max(1)
    scaled = np.clip(blocks * divided(np.ones_like(largest), largest)[:, None], -1, 1).reshape(-1)[: len(values)]
    return order[np.searchsorted(middles, scaled)].astype(np.uint8), largest


def _ascending(levels: Array) -> tuple[Array, Array]:
    """Return the indices of the levels in ascending order, and the midpoints between them."""
    import numpy as np

    order = np.argsort(levels, kind="stable")
    return order, (levels[order][1:] + levels[order][:-1]) / 2


def _by_library(values: Array, levels: Array, size: int) -> tuple[Array, Array] | None:
    """Use a compiled loop to compute the result of `packed_levels` or, if there are 256 levels, of `quantized`.

    Return None if no loop supports the input, or if the loop fails.
    """
    import numpy as np

    whole = len(levels) == 256 or (len(levels) == 16 and not (len(values) % size or size % 16))
    known = whole and values.dtype == levels.dtype == np.float32 and np.isfinite(values).all()
    loaded = loops() if known else None
    if loaded is None:
        return None
    order, middles = _ascending(levels)
    given, places = np.ascontiguousarray(values), order.astype(np.uint8)
    blocks = -(-len(values) // size)
    largest = np.empty(blocks, np.float32)
    if len(levels) == 16:
        codes, function, count = np.empty(len(values) // 2, np.uint8), loaded.adapterkit_levels, blocks
    else:
        codes, function, count = np.empty(len(values), np.uint8), loaded.adapterkit_indices, len(values)
    arrays = (array.ctypes.data for array in (middles, places, codes, largest))
    # The loop fails if the reciprocal of a block's largest magnitude overflows float32.
    return None if function(given.ctypes.data, count, size, *arrays) else (codes, largest)


def _weight(base: Checkpoint, name: str, kind: str) -> Packed:
    stored = part_of(base, name, name, ("U8", "BF16", "F16", "F32"))
    key = f"{name}{STATE}{kind}"
    state = _state(part_of(base, name, key, ("U8",)), key)
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    if stored.nbytes != -(-count // 2):
        why = f"{count} values of 4 bits need {-(-count // 2)} bytes, but the tensor has {stored.nbytes} bytes"
        raise ShapeMismatch(why, where=name, cure=DAMAGED)
    stored = Lazy((stored.nbytes,), BYTES, stored.source, stored.span)
    code = part_of(base, name, f"{name}.quant_map", ("F32",))
    expect(code.shape, (16,), f"{name}.quant_map")
    absmax, names = _absmax(base, name, state, -(-count // size))
    members = (name, key, f"{name}.quant_map", *names)
    return _Levels(name, shape, BY_TORCH[state["dtype"]], members, stored, code, absmax)


BYTES = BY_TORCH["uint8"]


class QuantState(TypedDict):
    """The JSON state of a packed weight, after `_fault` has checked it."""

    shape: list[int]
    blocksize: int
    dtype: str
    nested_blocksize: NotRequired[int]
    nested_offset: NotRequired[float]


def _absmax(base: Checkpoint, name: str, state: QuantState, blocks: int) -> tuple[_Blocks, tuple[str, ...]]:
    """Return the scales of a weight, and the names of the tensors in which they are stored."""
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
    scales = _Blocks(stored, key, size, table, _Blocks(above, above_key, nested), state.get("nested_offset", 0.0))
    return scales, (key, table_key, above_key)


def _state(stored: Lazy, key: str) -> QuantState:
    if stored.nbytes > LARGEST_STATE:
        why = f"the quantization state has {stored.nbytes} bytes, but at most {LARGEST_STATE} are allowed"
        raise Malformed(why, where=key, cure=DAMAGED)
    try:
        state = load_json(bytes(stored.fetch()).decode())
        json.dumps(state, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the quantization state is not valid JSON ({error})", where=key, cure=DAMAGED) from None
    fault = _fault(state)
    if fault is not None:
        raise Malformed(fault, where=key, cure=DAMAGED)
    return cast(QuantState, state)


def _fault(state: object) -> str | None:
    if not isinstance(state, dict):
        return "the quantization state is not a JSON object"
    shape = state.get("shape")
    if not isinstance(shape, list) or not shape or not all(_counts(n) for n in shape):
        return f"shape {shape!r} is not a list of positive whole numbers"
    if not _counts(state.get("blocksize")):
        return f"blocksize {state.get('blocksize')!r} is not a positive whole number"
    if state.get("dtype") not in ("bfloat16", "float16", "float32"):
        return f"dtype {state.get('dtype')!r} is not bfloat16, float16 or float32"
    nested = state.get("nested_blocksize")
    if nested is not None and not (_counts(nested) and isinstance(state.get("nested_offset"), (int, float))):
        return "nested_blocksize must be a positive whole number, and nested_offset must be a number"
    return None


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 48
