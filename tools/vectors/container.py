"""safetensors files byte by byte, for vectors: shares no code with adapterkit, and can write what no library would."""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_STORED = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1", "BOOL": "|b1"}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored(values: np.ndarray, dtype: str) -> Stored:
    """The values in an element type that must hold them exactly; bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        if (bits & 0xFFFF).any():
            raise ValueError("not exact in BF16")
        return Stored(dtype, values.shape, (bits >> 16).astype("<u2").tobytes())
    array = values.astype(_STORED[dtype])
    if not np.array_equal(array.astype(values.dtype), values):
        raise ValueError(f"not exact in {dtype}")
    return Stored(dtype, values.shape, array.tobytes())


def layout(tensors: dict[str, Stored]) -> tuple[dict[str, Any], bytes]:
    """The header's entries, and the data, of tensors that follow each other."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    return entries, data


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header, given as a value, text or bytes, and data; `length` lies about the header's own."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else text(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def native(record: Any, tensors: dict[str, Stored]) -> bytes:
    """A native adapter; the record is a value, or the text itself."""
    entries, data = layout(tensors)
    words = record if isinstance(record, str) else text(record)
    return pack({"__metadata__": {"adapterkit": words}, **entries}, data)


def text(value: Any) -> str:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def numbers(seed: str, *shape: int, positive: bool = False) -> np.ndarray:
    """Sixteenths between -2 and 2, never 0: sums and products of a few are exact in float64, whatever the order."""
    draw = random.Random(zlib.crc32(seed.encode()))
    count = int(np.prod(shape))
    values = [(1 + int(draw.random() * 32)) / 16 for _ in range(count)]
    signs = [1 if positive or draw.random() < 0.5 else -1 for _ in range(count)]
    return np.array([s * v for s, v in zip(signs, values, strict=True)], dtype=np.float64).reshape(shape)
