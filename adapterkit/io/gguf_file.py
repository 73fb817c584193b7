"""Read and write GGUF files, and read `ggla` files.

The header is parsed immediately, and every size is checked. A tensor's data is read only when it is needed.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, AdapterkitError, Malformed, Unsupported, storage_error
from .arrange import is_moved
from .atomic import remember, replacing, source_of
from .ggml_blocks import BLOCKS, NUMBERS, decoded, encoded
from .inputs import GGLA, GGUF, open_input
from .lazy import DTYPES, Lazy, Span, as_array, read_span

if TYPE_CHECKING:
    from .lazy import Array

__all__ = ["PLAIN", "Gguf", "GgufFields", "GgufValue", "raw_size", "read_gguf", "read_model", "write_gguf"]


ALIGNMENT = "general.alignment"

SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
"""A map from GGUF's number for the type of a metadata value to (type name, `struct` code)."""

STRING, ARRAY = 8, 9
VALUE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}
VALUE_NAMES = {number: name for name, number in VALUE_NUMBERS.items()}

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""A map from ggml's number for an unquantized tensor type to the name of the element type."""

Q8_0 = 8
TYPES = {name: number for number, name in PLAIN.items()} | {name: number for name, (number, _, _) in BLOCKS.items()}


@dataclass(frozen=True, slots=True)
class GgufValue:
    """One metadata value. `type` is a name such as `u32` or `string`, or `[type]` for an array.

    An array's value is a list, or a numpy array if it has more than a million numbers.
    """

    type: str
    value: Any


def numbers(data: bytes, code: str) -> Array:
    """Return little-endian bytes as a read-only numpy array. (A list would need a Python object for each number.)"""
    import numpy as np

    return np.frombuffer(data, np.dtype(code))


def raw_size(kind: str, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor; `kind` is the name of its type."""
    return size_of(shape, TYPES[kind])


def size_of(shape: Sequence[int], number: int) -> int:
    """Return a tensor's size in bytes, or 0 if its type is unknown; `number` is ggml's number for the type."""
    count = math.prod(shape)
    if number in NUMBERS:
        _, numbers, size = BLOCKS[NUMBERS[number]]
        return count // numbers * size
    return count * DTYPES[PLAIN[number]].itemsize if number in PLAIN else 0


def alignment_of(values: Mapping[str, GgufValue]) -> int:
    """Return the alignment of tensor data in bytes.

    Raises:
        Malformed: the stored alignment is out of range.
    """
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else 32
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise Malformed(f"{alignment!r} is not a valid alignment", where=ALIGNMENT, cure=DOWNLOAD_OR_WRITE_AGAIN)
    return alignment


def up(size: int, alignment: int) -> int:
    """Round a size up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


# Parse GGUF headers from untrusted files, with limits on every size.
#
# Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).


MAX_HEADER = 256 << 20
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 16
MAX_DEPTH = 4
MAX_LISTED = 1 << 20
"""A numeric array with more items becomes a numpy array instead of a list: as a list, 250 MB of numbers took 4 GB."""

MAX_ITEMS = 1 << 22
"""The limit for one header: all its arrays together may contain at most this many strings and nested arrays.

The largest vocabularies have 262,144 tokens and about as many merges.
"""


class Reader:
    """Read the header of a file from its start. Refuse to read past the file's end, or more than `MAX_HEADER` bytes."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size, self.at, self.items = file, path, size, 0, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            why = f"{what} needs {count} bytes, but the file has only {self.size - self.at} more"
            raise self.damaged(why)
        if self.at + count > MAX_HEADER:
            raise self.damaged(f"the header is longer than {MAX_HEADER} bytes")
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
            raise self.damaged(f"{what} has a length of {length} bytes; at most {limit} are allowed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def damaged(self, why: str) -> Malformed:
        return Malformed(why, path=self.path, where=f"byte {self.at}", cure=DOWNLOAD_OR_WRITE_AGAIN)


def read_keys(reader: Reader) -> tuple[dict[str, GgufValue], int, int, dict[str, int]]:
    """Return the key-values, the number of tensors, the version, and the byte offset of each key's value."""
    if reader.take(4, "the magic number") != GGUF:
        raise reader.damaged("this is not a GGUF file")
    version = reader.number("<I", "a version")
    if version not in (2, 3):
        # In a big-endian file, version 3 is read as 0x03000000.
        swapped = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise Unsupported(
            f"the file is GGUF, {swapped}", path=reader.path, cure="Write it as GGUF version 3, little-endian"
        )
    count, keys = reader.number("<Q", "a count"), reader.number("<Q", "a count")
    if count > MAX_TENSORS or keys > MAX_TENSORS:
        raise reader.damaged(f"the header declares {count} tensors and {keys} keys; at most {MAX_TENSORS} are allowed")
    values: dict[str, GgufValue] = {}
    places: dict[str, int] = {}
    for _ in range(keys):
        key = reader.string("a key", MAX_NAME)
        if key in values:
            raise reader.damaged(f"the key {key!r} occurs twice")
        number = reader.number("<I", "a type")
        places[key] = reader.at
        values[key] = _value(reader, number, key)
    return values, count, version, places


def _value(reader: Reader, number: int, key: str, depth: int = 0) -> GgufValue:
    if number in SCALARS:
        name, code = SCALARS[number]
        return GgufValue(name, reader.number(code, f"the value of {key!r}"))
    if number == STRING:
        return GgufValue("string", reader.string(f"the value of {key!r}"))
    if number != ARRAY or depth == MAX_DEPTH:
        raise reader.damaged(f"{key!r} has the unknown type {number}, or arrays nested more than {MAX_DEPTH} deep")
    inner, length = reader.number("<I", "a type"), reader.number("<Q", "a length")
    if inner in SCALARS:
        name, code = SCALARS[inner]
        size = struct.calcsize(code)
        data = reader.take(length * size, f"an array at {key!r}")
        if length > MAX_LISTED:
            return GgufValue(f"[{name}]", numbers(data, code))
        return GgufValue(f"[{name}]", list(struct.unpack(f"<{length}{code[1]}", data)))
    # Check the number of items before creating a list. Each string or array takes at least 8 bytes, for its length.
    if length * 8 > reader.size - reader.at:
        raise reader.damaged(f"{key!r} is an array of {length} items, but the rest of the file is too short for them")
    reader.items += length
    if reader.items > MAX_ITEMS:
        raise reader.damaged(f"the arrays contain more than {MAX_ITEMS:,} strings and nested arrays")
    return GgufValue(
        f"[{VALUE_NAMES.get(inner, 'array')}]", [_value(reader, inner, key, depth + 1).value for _ in range(length)]
    )


def read_entries(
    reader: Reader, values: dict[str, GgufValue], count: int
) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, int], int, int]:
    """Read the table of tensors.

    Returns:
        Four values. The first maps each tensor's name to (shape, type number, offset of its bytes in the data). The
        second maps each tensor's name to the offset of its type field in the header. The third is the offset in the
        file at which the data begins, and the fourth is the alignment.
    """
    alignment = alignment_of(values)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    places: dict[str, int] = {}
    for _ in range(count):
        name = reader.string("a name", MAX_NAME)
        if name in entries:
            raise reader.damaged(f"the tensor {name!r} occurs twice")
        axes = reader.number("<I", "a count of axes")
        if axes > 8:
            raise reader.damaged(f"a tensor has {axes} axes; at most 8 are allowed")
        sizes = struct.unpack(f"<{axes}Q", reader.take(8 * axes, "a shape"))
        places[name] = reader.at
        number, offset = reader.number("<I", "a type"), reader.number("<Q", "an offset")
        entries[name] = (sizes[::-1], number, offset)
        # The shape is reversed, because GGUF lists the fastest axis first and numpy lists it last.
    return entries, places, up(reader.at, alignment), alignment


def check_place(
    reader: Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> None:
    """Check that a tensor consists of whole blocks, is aligned, and lies inside the file.

    Raises:
        Malformed: the tensor's rows are not whole blocks, or its data is not aligned or ends after the file's end.
    """
    kind = NUMBERS.get(number)
    if kind is not None and (not shape or shape[-1] % BLOCKS[kind][1]):
        raise reader.damaged(f"the row length of {name!r} is not a multiple of the block size {BLOCKS[kind][1]}")
    size = size_of(shape, number)
    if offset % alignment or start + offset + size > reader.size:
        why = f"{name!r} ({size} bytes at {offset}) is not aligned to {alignment} bytes, or ends after the file's end"
        raise reader.damaged(why)


def check_apart(reader: Reader, entries: Mapping[str, tuple[tuple[int, ...], int, int]]) -> None:
    """Check that tensors do not overlap.

    Raises:
        Malformed: two tensors overlap.
    """
    end = 0
    for name, (shape, number, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise reader.damaged(f"{name!r} overlaps another tensor")
        end = offset + size_of(shape, number)


# Read GGUF adapters. The key-values are read immediately, but a tensor's data is read only when it is fetched.


@dataclass(frozen=True, slots=True, eq=False)
class Gguf:
    """The content of a GGUF file.

    Attributes:
        values: the metadata values by key, in the file's order.
        tensors: the tensors by name, in the file's order. Their axes have numpy's order. Q8_0 tensors are read as F32.
        types: tensor name -> name of the tensor's type in the file.
        version: the GGUF version.
    """

    values: Mapping[str, GgufValue]
    tensors: Mapping[str, Lazy]
    types: Mapping[str, str]
    version: int = 3


def read_gguf(path: str | os.PathLike[str], *, tensors: bool = True) -> Gguf:
    """Read the header of a GGUF adapter.

    Args:
        path: the file.
        tensors: whether to read the list of tensors; if False, only the key-values are read.

    Raises:
        Malformed: the data of a tensor lies outside the file, or the header states a size that exceeds the file's size.
        Unsupported: the version is not 2 or 3, the file is big-endian, a tensor is quantized with another type than
            Q8_0, or an array has more than `MAX_LISTED` numbers.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            return _read(Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size), tensors)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        raise error.at(path=path) from None


def _read(reader: Reader, tensors: bool) -> Gguf:
    values, count, version, _ = read_keys(reader)
    for key, value in values.items():
        if value.type.startswith("[") and not isinstance(value.value, list):
            why, cure = f"the array has {len(value.value):,} numbers, too many for an adapter", "Remove this key"
            raise Unsupported(why, path=reader.path, where=key, cure=cure)
    return _with_tensors(reader, values, count if tensors else 0, version)


def _with_tensors(reader: Reader, values: dict[str, GgufValue], count: int, version: int) -> Gguf:
    entries, _, start, alignment = read_entries(reader, values, count)
    tensors = {name: _tensor(reader, name, start, alignment, *entries[name]) for name in entries}
    check_apart(reader, entries)
    types = {name: PLAIN.get(number, "Q8_0") for name, (_, number, _) in entries.items()}
    return Gguf(values, tensors, types, version)


def _tensor(
    reader: Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> Lazy:
    if number not in PLAIN and number != Q8_0:
        why = f"the tensor has ggml type {number}, which is not supported in an adapter"
        cure = "Convert the adapter to F32, F16, BF16 or Q8_0"
        raise Unsupported(why, path=reader.path, where=name, cure=cure)
    check_place(reader, name, start, alignment, shape, number, offset)
    span = Span(reader.path, start + offset, size_of(shape, number))
    if number == Q8_0:
        return Lazy(shape, DTYPES["F32"], lambda: decoded("Q8_0", read_span(span)).tobytes())
    dtype = DTYPES[PLAIN[number]]
    source = source_of(reader.path, name, dtype, span.nbytes)
    if source is not None and source.shape == shape:
        return source
    return Lazy(shape, dtype, None, span)


# Read GGUF model files, whose tensors may have any type: find each tensor in the file, and make a header for a file in
# which the tensors have other types.


FILE_TYPE = "general.file_type"

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""A map from the most frequent tensor type of a file to the number that llama.cpp stores as `general.file_type`."""


@dataclass(frozen=True, slots=True, eq=False)
class GgufFields:
    """The header of a model file, and the location of its tensors.

    Attributes:
        values: the metadata values by key.
        types: tensor name -> name of the tensor's type, in the file's order.
        shapes: tensor name -> shape, with axes in numpy's order.
        spans: tensor name -> location of the tensor's bytes, including the padding before the next tensor.
        alignment: the alignment of the data, in bytes.
        raw: the bytes of the header.
        entries: tensor name -> offset of the tensor's type field in the header. The next field is the data offset.
        places: key -> offset of the key's value in the header.
    """

    values: Mapping[str, GgufValue]
    types: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, Span]
    alignment: int
    raw: bytes
    entries: Mapping[str, int]
    places: Mapping[str, int]

    def header(self, kinds: Mapping[str, str]) -> bytes:
        """Return the header of a file in which the tensors have the types `kinds` (tensor name -> type name).

        The data offsets match these types, and so does `general.file_type` if the model has this key. A tensor that is
        not in `kinds` keeps its type.
        """
        # Change only the types, the offsets and the file type in the original bytes. Other key-values stay the same.
        if all(kinds.get(name, kind) == kind for name, kind in self.types.items()):
            return self.raw
        head, offset = bytearray(self.raw), 0
        for name in self.spans:
            kind = kinds.get(name, self.types[name])
            struct.pack_into("<IQ", head, self.entries[name], TYPES[kind], offset)
            offset += up(raw_size(kind, self.shapes[name]), self.alignment)
        file_type = FILE_TYPES.get(self._most({name: kinds.get(name, kind) for name, kind in self.types.items()}))
        if file_type is not None and FILE_TYPE in self.values and self.values[FILE_TYPE].type == "u32":
            struct.pack_into("<I", head, self.places[FILE_TYPE], file_type)
        return bytes(head)

    def _most(self, kinds: Mapping[str, str]) -> str:
        """Return the tensor type that stores the most elements, counting only tensors with more than one axis."""
        counts: dict[str, int] = {}
        for name, kind in kinds.items():
            if len(self.shapes[name]) > 1:
                counts[kind] = counts.get(kind, 0) + math.prod(self.shapes[name])
        return max(counts, key=lambda kind: counts[kind], default="")


def read_model(path: str | os.PathLike[str]) -> GgufFields:
    """Read the header of a model whose tensors may have any type in `BLOCKS` or `PLAIN`.

    Raises:
        Malformed: the data of a tensor lies outside the file, or there are gaps between tensors.
        Unsupported: the version is not 2 or 3, the file is big-endian, or the type of a tensor is unknown.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            reader = Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size)
            values, count, _, places = read_keys(reader)
            infos, entries, start, alignment = read_entries(reader, values, count)
            check_apart(reader, infos)
            file.seek(0)
            raw = file.read(start)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        raise error.at(path=path) from None
    types = {name: _type_name(reader, name, number) for name, (_, number, _) in infos.items()}
    spans = _spans(reader, infos, start, alignment)
    shapes = {name: shape for name, (shape, _, _) in infos.items()}
    return GgufFields(values, types, shapes, spans, alignment, raw, entries, places)


def _spans(
    reader: Reader, entries: Mapping[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, Span]:
    spans, end = {}, start
    for name, (shape, number, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        check_place(reader, name, start, alignment, shape, number, offset)
        if start + offset != end:
            raise reader.damaged(f"{name!r} does not begin at the end of the previous tensor")
        end = min(start + offset + up(size_of(shape, number), alignment), reader.size)
        spans[name] = Span(reader.path, start + offset, end - start - offset)
    return spans


def _type_name(reader: Reader, name: str, number: int) -> str:
    kind = PLAIN.get(number) or NUMBERS.get(number)
    if kind is None:
        cure = f"Quantize the model with llama.cpp to one of these types: {', '.join([*PLAIN.values(), *BLOCKS])}"
        why = f"the tensor has ggml type {number}, which is not supported"
        raise Unsupported(why, path=reader.path, where=name, cure=cure)
    return kind


# Write GGUF files atomically, with one tensor in memory at a time.


def write_gguf(
    path: str | os.PathLike[str], values: Mapping[str, GgufValue], tensors: Mapping[str, Lazy], types: Mapping[str, str]
) -> None:
    """Write a GGUF file of version 3 atomically. gguf-py would write the same bytes.

    Args:
        path: the file.
        values: the key-values.
        tensors: the tensors by name.
        types: tensor name -> `Q8_0`, for each tensor to quantize. All other tensors keep their element type.

    Raises:
        Malformed: a metadata value does not fit its type.
        Unsupported: GGUF lacks the element type of a tensor.
    """
    alignment = alignment_of(values)
    head = bytearray(GGUF + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        try:
            head += _string(key) + _encoded(value)
        except (KeyError, TypeError, AttributeError, struct.error):
            raise Malformed(
                f"{value.value!r} is not of type {value.type}", where=key, cure="Correct the value"
            ) from None
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

    return read_gguf(path).tensors


def _type_number(name: str, tensor: Lazy, types: Mapping[str, str]) -> int:
    kind = types.get(name, tensor.dtype.name)
    if kind not in TYPES:
        raise Unsupported(f"GGUF has no element type {kind}", where=name, cure="Convert the adapter to F32 first")
    return TYPES[kind]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: GgufValue) -> bytes:
    if not value.type.startswith("["):
        return struct.pack("<I", VALUE_NUMBERS[value.type]) + _plain(value.type, value.value)
    inner = value.type[1:-1]
    head = struct.pack("<IIQ", ARRAY, VALUE_NUMBERS[inner], len(value.value))
    return head + b"".join(_plain(inner, item) for item in value.value)


def _plain(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "string" else struct.pack(SCALARS[VALUE_NUMBERS[kind]][1], value)


# Read `ggla` files, llama.cpp's format of LoRA adapters before it used GGUF. Every size is checked.
#
# Format: convert-lora-to-ggml.py, part of llama.cpp until 2024.


GGLA_TYPES = {0: "F32", 1: "F16"}


@dataclass(frozen=True, slots=True, eq=False)
class Ggla:
    """The content of a `ggla` file: rank, alpha, and the tensors by name. The tensors' axes have numpy's order."""

    rank: int
    alpha: int
    tensors: Mapping[str, Lazy]


def read_ggla(path: str | os.PathLike[str]) -> Ggla:
    """Read the headers of all tensors in a `ggla` file. The data of a tensor is read when it is needed.

    Raises:
        Malformed: a size is out of range, or tensor data lies outside the file.
        Unsupported: the version is unknown, or a tensor is quantized.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            return _read_ggla(file, os.fspath(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise storage_error(error, path) from error


def _read_ggla(file: BinaryIO, path: str, size: int) -> Ggla:
    def damaged(why: str) -> Malformed:
        return Malformed(why, path=path, where=f"byte {file.tell()}", cure=DOWNLOAD_OR_WRITE_AGAIN)

    def numbers(count: int) -> tuple[int, ...]:
        data = file.read(4 * count)
        if len(data) != 4 * count:
            raise damaged("the file ends too early")
        return struct.unpack(f"<{count}i", data)

    if file.read(4) != GGLA:
        raise damaged("this is not a ggla file")
    version, rank, alpha = numbers(3)
    if version != 1:
        raise Unsupported(f"the file has ggla version {version}", path=path, cure="Convert the adapter to GGUF")
    if rank < 1:
        raise damaged(f"the rank is {rank}; it must be at least 1")
    tensors: dict[str, Lazy] = {}
    while file.tell() < size:
        axes, length, kind = numbers(3)
        if not 1 <= axes <= 4 or not 1 <= length <= 1 << 12:
            raise damaged(f"a tensor has {axes} axes (allowed: 1 to 4) and a name of {length} bytes (1 to {1 << 12})")
        shape = numbers(axes)[::-1]
        name = file.read(length).decode("utf-8", "replace")
        if kind not in GGLA_TYPES:
            why, cure = f"the tensor has ggml type {kind}, which is not supported", "Convert the adapter to F32 or F16"
            raise Unsupported(why, path=path, where=name, cure=cure)
        # The writer aligns each tensor's data to 32 bytes.
        start = -(-file.tell() // 32) * 32
        nbytes = math.prod(shape) * DTYPES[GGLA_TYPES[kind]].itemsize
        if min(shape) < 1 or start + nbytes > size or name in tensors:
            raise damaged(f"{name!r} {list(shape)} occurs twice, has an empty axis, or ends after the file's end")
        span = Span(path, start, nbytes)
        tensors[name] = Lazy(shape, DTYPES[GGLA_TYPES[kind]], None, span)
        file.seek(start + nbytes)
    return Ggla(rank, alpha, tensors)
