"""Parse GGUF headers from untrusted files, with limits on every size."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from ...errors import Malformed, Unsupported
from ..ggml_blocks import BLOCKS, NUMBERS
from ..magic_bytes import GGUF
from .layout import ARRAY, SCALARS, STRING, VALUE_NAMES, Value, alignment_of, numbers, size_of, up

MAX_HEADER = 256 << 20
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 16
MAX_DEPTH = 4
MAX_LISTED = 1 << 20
"""Longest numeric array that becomes a list; longer ones stay bytes. Python objects for 250 MB of numbers took 4 GB."""

MAX_ITEMS = 1 << 22
"""Most strings in all arrays together. The largest vocabularies have 262,144 tokens and about as many merges."""


class Reader:
    """Reads a file from its start, never beyond its end, and never more than `MAX_HEADER` bytes."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size, self.at, self.items = file, path, size, 0, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            why = f"{what} of {count} bytes, where {self.size - self.at} are left in the file"
            raise self.damaged(why)
        if self.at + count > MAX_HEADER:
            raise self.damaged(f"a header of more than {MAX_HEADER} bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise self.damaged("the file ends too early")
        self.at += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str, limit: int = MAX_HEADER) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise self.damaged(f"{what} of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} that is not UTF-8") from None

    def damaged(self, why: str) -> Malformed:
        return Malformed(why, path=self.path, where=f"byte {self.at}", cure="Fetch or write the file again")


def read_keys(reader: Reader) -> tuple[dict[str, Value], int, int, dict[str, int]]:
    """Return the key-values, the number of tensors, the version, and the offset of each key's value."""
    if reader.take(4, "a magic") != GGUF:
        raise reader.damaged("not a GGUF file")
    version = reader.number("<I", "a version")
    if version not in (2, 3):
        # Read in the wrong byte order, version 3 is 0x03000000.
        swapped = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise Unsupported(f"GGUF, {swapped}", path=reader.path, cure="Write it little-endian, of version 3")
    count, keys = reader.number("<Q", "a count"), reader.number("<Q", "a count")
    if count > MAX_TENSORS or keys > MAX_TENSORS:
        raise reader.damaged(f"{count} tensors and {keys} keys")
    values: dict[str, Value] = {}
    places: dict[str, int] = {}
    for _ in range(keys):
        key = reader.string("a key", MAX_NAME)
        if key in values:
            raise reader.damaged(f"the key {key!r} twice")
        number = reader.number("<I", "a type")
        places[key] = reader.at
        values[key] = _value(reader, number, key)
    return values, count, version, places


def _value(reader: Reader, number: int, key: str, depth: int = 0) -> Value:
    if number in SCALARS:
        name, code = SCALARS[number]
        return Value(name, reader.number(code, f"the value of {key!r}"))
    if number == STRING:
        return Value("string", reader.string(f"the value of {key!r}"))
    if number != ARRAY or depth == MAX_DEPTH:
        raise reader.damaged(f"{key!r} is of a type {number} that GGUF does not have")
    inner, length = reader.number("<I", "a type"), reader.number("<Q", "a length")
    if inner in SCALARS:
        name, code = SCALARS[inner]
        size = struct.calcsize(code)
        data = reader.take(length * size, f"an array at {key!r}")
        if length > MAX_LISTED:
            return Value(f"[{name}]", numbers(data, code))
        return Value(f"[{name}]", list(struct.unpack(f"<{length}{code[1]}", data)))
    # A string or array takes 8 bytes or more, for its length. Check before a list of that many items is made.
    if length * 8 > reader.size - reader.at:
        raise reader.damaged(f"an array of {length} at {key!r}, more than the file could hold")
    reader.items += length
    if reader.items > MAX_ITEMS:
        raise reader.damaged(f"arrays of more than {MAX_ITEMS:,} texts and arrays")
    return Value(
        f"[{VALUE_NAMES.get(inner, 'array')}]", [_value(reader, inner, key, depth + 1).value for _ in range(length)]
    )


def read_entries(
    reader: Reader, values: dict[str, Value], count: int
) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, int], int, int]:
    """Return name -> (shape, type, offset); name -> offset of its type field; the data's offset; the alignment."""
    alignment = alignment_of(values)
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    places: dict[str, int] = {}
    for _ in range(count):
        name = reader.string("a name", MAX_NAME)
        if name in found:
            raise reader.damaged(f"the tensor {name!r} twice")
        axes = reader.number("<I", "a count of axes")
        if axes > 8:
            raise reader.damaged(f"a tensor of {axes} axes")
        sizes = struct.unpack(f"<{axes}Q", reader.take(8 * axes, "a shape"))
        places[name] = reader.at
        number, offset = reader.number("<I", "a type"), reader.number("<Q", "an offset")
        found[name] = (sizes[::-1], number, offset)
        # GGUF lists the fastest axis first, numpy last.
    return found, places, up(reader.at, alignment), alignment


def check_place(
    reader: Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> None:
    """Check that a tensor consists of whole blocks, is aligned, and lies inside the file.

    Raises:
        Malformed: it does not.
    """
    kind = NUMBERS.get(number)
    if kind is not None and (not shape or shape[-1] % BLOCKS[kind][1]):
        raise reader.damaged(f"rows of {name!r} are not a multiple of the block size of {BLOCKS[kind][1]}")
    size = size_of(shape, number)
    if offset % alignment or start + offset + size > reader.size:
        raise reader.damaged(f"{name!r} of {size} bytes at {offset} is not aligned, or lies beyond the end")


def check_apart(reader: Reader, found: Mapping[str, tuple[tuple[int, ...], int, int]]) -> None:
    """Check that no tensors overlap.

    Raises:
        Malformed: two tensors do.
    """
    end = 0
    for name, (shape, number, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise reader.damaged(f"{name!r} lies over another tensor")
        end = offset + size_of(shape, number)
