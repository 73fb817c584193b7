"""Write GGUF files atomically, with one tensor in memory at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import Malformed, Unsupported
from ..arrange import is_moved
from ..atomic import replacing
from ..ggml_blocks import encoded
from ..lazy import Lazy, as_array
from ..magic_bytes import GGUF
from ..written import remember
from .layout import ARRAY, Q8_0, SCALARS, TYPES, VALUE_NUMBERS, Value, alignment_of, size_of, up


def write_gguf(
    path: str | os.PathLike[str], values: Mapping[str, Value], tensors: Mapping[str, Lazy], types: Mapping[str, str]
) -> None:
    """Write a version 3 file atomically; its bytes equal those that gguf-py writes.

    Args:
        path: the file.
        values: the key-values.
        tensors: name -> tensor.
        types: name -> `Q8_0` for tensors to quantize; others keep their element type.

    Raises:
        Unsupported: GGUF lacks an element type.
    """
    alignment = alignment_of(values)
    head = bytearray(GGUF + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        try:
            head += _string(key) + _encoded(value)
        except (KeyError, TypeError, AttributeError, struct.error):
            raise Malformed(f"{value.value!r} is no {value.type}", where=key, cure="Correct the value") from None
    offset = 0
    for name, tensor in tensors.items():
        number = _type_number(name, tensor, types)
        shape = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        offset += up(size_of(tensor.shape, number), alignment)
    with replacing(Path(path)) as file:
        file.write(bytes(head) + bytes(-len(head) % alignment))
        for name, tensor in tensors.items():
            data = tensor.fetch() if _type_number(name, tensor, types) != Q8_0 else encoded("Q8_0", as_array(tensor))
            file.write(data)
            file.write(bytes(-len(data) % alignment))
    plain = {n: t for n, t in tensors.items() if is_moved(t) and _type_number(n, t, types) != Q8_0}
    remember(path, plain, _tensors_of)


def _tensors_of(path: str) -> Mapping[str, Lazy]:
    from .reading import read_gguf

    return read_gguf(path).tensors


def _type_number(name: str, tensor: Lazy, types: Mapping[str, str]) -> int:
    kind = types.get(name, tensor.dtype.name)
    if kind not in TYPES:
        raise Unsupported(f"GGUF has no element type {kind}", where=name, cure="Convert the adapter to F32 first")
    return TYPES[kind]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> bytes:
    if not value.type.startswith("["):
        return struct.pack("<I", VALUE_NUMBERS[value.type]) + _plain(value.type, value.value)
    inner = value.type[1:-1]
    head = struct.pack("<IIQ", ARRAY, VALUE_NUMBERS[inner], len(value.value))
    return head + b"".join(_plain(inner, item) for item in value.value)


def _plain(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "string" else struct.pack(SCALARS[VALUE_NUMBERS[kind]][1], value)
