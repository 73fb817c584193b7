"""Read and create one-number tensors without numpy: adapter files hold thousands of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache

from .dtypes import DTYPES
from .lazy import ELSEWHERE, Lazy, Span, as_array, read_span

_CODES = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I",
    "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip


def value_of(leaf: Lazy) -> float:
    """Return the first number of a tensor, which should hold one."""
    data, name = bytes(leaf.fetch()), leaf.dtype.name
    if name == "BF16":
        # A bfloat16 is the upper half of a float32.
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if name in _CODES:
        return float(struct.unpack(_CODES[name], data)[0])
    return float(as_array(leaf).reshape(-1)[0])


@lru_cache(maxsize=1 << 10)
def number_of(text: str) -> Lazy:
    """Return the number that `float.hex` wrote, as float32 if that is exact, else as float64."""
    value = float.fromhex(text)
    code = "F32" if _single(value) else "F64"
    data = struct.pack(_CODES[code], value)
    return Lazy((), DTYPES[code], lambda: data)


def _single(value: float) -> bool:
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False


def at_once(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Return the tensors with one-number tensors already read, adjacent ones in a single read."""
    single = [leaf for leaf in tensors.values() if leaf.nbytes == leaf.dtype.itemsize]
    spans = sorted((leaf.span for leaf in single if leaf.span), key=lambda span: (span.path, span.offset))
    held = {span: data for run in _runs(spans) for span, data in _read(run)}
    return {name: _holding(leaf, held) for name, leaf in tensors.items()}


def _holding(leaf: Lazy, held: Mapping[Span, bytes]) -> Lazy:
    data = held.get(leaf.span) if leaf.span and leaf.nbytes == leaf.dtype.itemsize else None
    return leaf if data is None else Lazy(leaf.shape, leaf.dtype, lambda: data, leaf.span)


def _runs(spans: list[Span]) -> list[list[Span]]:
    runs: list[list[Span]] = []
    for span in spans:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.path, last.offset + last.nbytes) == (span.path, span.offset):
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _read(run: list[Span]) -> list[tuple[Span, bytes]]:
    first, last = run[0], run[-1]
    if len(run) < 2 or first.path in ELSEWHERE:
        return []
    data = bytes(read_span(Span(first.path, first.offset, last.offset + last.nbytes - first.offset)))
    return [(span, data[span.offset - first.offset :][: span.nbytes]) for span in run]
