"""What numbers in a GGUF file mean: types of values and tensors, sizes, alignment."""

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
"""Number of a type of values -> its name here and its code in `struct`."""

STRING, ARRAY = 8, 9
VALUE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}
VALUE_NAMES = {number: name for name, number in VALUE_NUMBERS.items()}

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Number of a type of tensors -> element type."""

Q8_0 = 8
TYPES = {name: number for number, name in PLAIN.items()} | {name: number for name, (number, _, _) in BLOCKS.items()}


@dataclass(frozen=True, slots=True)
class Value:
    """One value: `type` is a name such as `u32` or `string`; of an array `[type]`.

    The value of an array is a list; more than a million numbers are an array of numpy.
    """

    type: str
    value: Any


def numbers(data: bytes, code: str) -> Any:
    """An array's numbers from little-endian bytes, as a read-only array of numpy: a sequence without an object each."""
    import numpy as np

    return np.frombuffer(data, np.dtype(code))


def raw_size(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a type."""
    return size_of(shape, TYPES[kind])


def size_of(shape: Sequence[int], number: int) -> int:
    """Bytes of a tensor of a type by its number; 0 of a type that is not known."""
    count = math.prod(shape)
    if number in NUMBERS:
        _, numbers, size = BLOCKS[NUMBERS[number]]
        return count // numbers * size
    return count * DTYPES[PLAIN[number]].itemsize if number in PLAIN else 0


def alignment_of(values: Mapping[str, Value]) -> int:
    """What the places of tensors are multiples of, in bytes.

    Raises:
        Malformed: what the key-values say is none.
    """
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else 32
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise Malformed(f"{alignment!r} is no alignment", where=ALIGNMENT, cure="Fetch or write the file again")
    return alignment


def up(size: int, alignment: int) -> int:
    """The size filled up to a multiple of the alignment."""
    return -(-size // alignment) * alignment
