"""The numeric codes of GGUF files: types of values and tensors, sizes, alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import Malformed
from ..dtypes import DTYPES
from ..ggml_blocks import BLOCKS, NUMBERS

ALIGNMENT = "general.alignment"

SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
"""GGUF's number of a value type -> its name here and its `struct` code."""

STRING, ARRAY = 8, 9
VALUE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}
VALUE_NAMES = {number: name for name, number in VALUE_NUMBERS.items()}

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""ggml's number of an unquantized tensor type -> element type."""

Q8_0 = 8
TYPES = {name: number for number, name in PLAIN.items()} | {name: number for name, (number, _, _) in BLOCKS.items()}


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value. `type` is a name such as `u32` or `string`, or `[type]` for an array.

    An array's value is a list; if it has more than a million numbers, a numpy array.
    """

    type: str
    value: Any


def numbers(data: bytes, code: str) -> Any:
    """Return little-endian bytes as a read-only numpy array, which needs no Python object per number."""
    import numpy as np

    return np.frombuffer(data, np.dtype(code))


def raw_size(kind: str, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor of a named type."""
    return size_of(shape, TYPES[kind])


def size_of(shape: Sequence[int], number: int) -> int:
    """Return the size in bytes of a tensor of a numbered type; 0 for an unknown type."""
    count = math.prod(shape)
    if number in NUMBERS:
        _, numbers, size = BLOCKS[NUMBERS[number]]
        return count // numbers * size
    return count * DTYPES[PLAIN[number]].itemsize if number in PLAIN else 0


def alignment_of(values: Mapping[str, Value]) -> int:
    """Return the alignment of tensor data in bytes.

    Raises:
        Malformed: the stored alignment is out of range.
    """
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else 32
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise Malformed(
            f"{alignment!r} is not a valid alignment", where=ALIGNMENT, cure="Fetch or write the file again"
        )
    return alignment


def up(size: int, alignment: int) -> int:
    """Round a size up to a multiple of the alignment."""
    return -(-size // alignment) * alignment
