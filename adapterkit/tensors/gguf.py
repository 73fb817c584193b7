"""GGUF files: key-values and tensors, headers only until a tensor is fetched; every count and size is checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import AdapterkitError, Malformed, Unsupported, storage_error
from .atomic import replacing
from .dtypes import DTYPES
from .ggml_blocks import BLOCKS, NUMBERS, decoded, encoded
from .lazy import Lazy, Span, as_array, read_span

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"

SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
"""Number of a type of values -> its name here and its code in `struct`."""

STRING, ARRAY = 8, 9
_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}
_NAMES = {number: name for name, number in _NUMBERS.items()}

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Number of a type of tensors -> element type."""

FILE_TYPE = "general.file_type"

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""Type that most matrices of a file have -> llama.cpp's number for such a file, in `general.file_type`."""

Q8_0 = 8
_TYPES = {name: number for number, name in PLAIN.items()} | {name: number for name, (number, _, _) in BLOCKS.items()}

MAX_HEADER = 256 << 20
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 16
MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Value:
    """One value: `type` is a name such as `u32` or `string`; of an array `[type]`."""

    type: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Gguf:
    """What a file holds.

    Attributes:
        values: key -> value, in the file's order.
        tensors: name -> tensor in numpy's axis order, in the file's order; Q8_0 is given as F32.
        types: name -> name of the type that the file has it in.
        version: of the container.
    """

    values: Mapping[str, Value]
    tensors: Mapping[str, Lazy]
    types: Mapping[str, str]
    version: int = 3


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The header of a model file, and where its tensors lie.

    Attributes:
        values: key -> value.
        types: name -> name of its type, in the file's order.
        shapes: name -> shape in numpy's axis order.
        spans: name -> its bytes, with what fills them up to the next tensor.
        alignment: of the data.
        raw: the bytes of the header.
        entries: name -> where in the header its type stands; its offset stands behind it.
        places: key -> where in the header its value stands.
    """

    values: Mapping[str, Value]
    types: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, Span]
    alignment: int
    raw: bytes
    entries: Mapping[str, int]
    places: Mapping[str, int]

    def header(self, kinds: Mapping[str, str]) -> bytes:
        """The header with tensors in other types, one behind the other in their data's order, and their file type."""
        if all(kinds.get(name, kind) == kind for name, kind in self.types.items()):
            return self.raw
        head, offset = bytearray(self.raw), 0
        for name in self.spans:
            kind = kinds.get(name, self.types[name])
            struct.pack_into("<IQ", head, self.entries[name], _TYPES[kind], offset)
            offset += _up(raw_size(kind, self.shapes[name]), self.alignment)
        said = FILE_TYPES.get(self._most({name: kinds.get(name, kind) for name, kind in self.types.items()}))
        if said is not None and FILE_TYPE in self.values and self.values[FILE_TYPE].type == "u32":
            struct.pack_into("<I", head, self.places[FILE_TYPE], said)
        return bytes(head)

    def _most(self, kinds: Mapping[str, str]) -> str:
        """The type that most numbers in matrices have."""
        counts: dict[str, int] = {}
        for name, kind in kinds.items():
            if len(self.shapes[name]) > 1:
                counts[kind] = counts.get(kind, 0) + math.prod(self.shapes[name])
        return max(counts, key=lambda kind: counts[kind], default="")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one; no error is raised."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str], *, tensors: bool = True) -> Gguf:
    """Reads a header.

    Args:
        path: the file.
        tensors: whether to go on after the key-values.

    Raises:
        Malformed: something lies outside the file, or is larger than the file could hold.
        Unsupported: another version or byte order, or tensors quantized in other ways than Q8_0.
        StorageError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return _read(_Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size), tensors)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        raise error.at(path=path) from None


def read_model(path: str | os.PathLike[str]) -> Model:
    """Reads the header of a model, whose tensors may be of any type that `BLOCKS` or `PLAIN` has.

    Raises:
        Malformed: something lies outside the file, or tensors do not lie one behind the other.
        Unsupported: another version, byte order or type.
        StorageError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size)
            values, count, _, places = _keys(reader)
            found, entries, start, alignment = _entries(reader, values, count)
            _check_apart(reader, found)
            file.seek(0)
            raw = file.read(start)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        raise error.at(path=path) from None
    types = {name: _type_name(reader, name, number) for name, (_, number, _) in found.items()}
    spans = _spans(reader, found, start, alignment)
    shapes = {name: shape for name, (shape, _, _) in found.items()}
    return Model(values, types, shapes, spans, alignment, raw, entries, places)


def raw_size(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a type."""
    return _size(shape, _TYPES[kind])


def _spans(
    reader: _Reader, found: Mapping[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, Span]:
    spans, end = {}, start
    for name, (shape, number, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        _check_place(reader, name, start, alignment, shape, number, offset)
        if start + offset != end:
            raise reader.damaged(f"{name!r} does not begin where the tensor before it ends")
        end = min(start + offset + _up(_size(shape, number), alignment), reader.size)
        spans[name] = Span(reader.path, start + offset, end - start - offset)
    return spans


def _type_name(reader: _Reader, name: str, number: int) -> str:
    kind = PLAIN.get(number) or NUMBERS.get(number)
    if kind is None:
        cure = f"Known: {', '.join([*PLAIN.values(), *BLOCKS])}; let llama.cpp quantize the model to one of them"
        raise Unsupported(f"a tensor of GGUF's type {number}", path=reader.path, where=name, cure=cure)
    return kind


def write_gguf(
    path: str | os.PathLike[str], values: Mapping[str, Value], tensors: Mapping[str, Lazy], types: Mapping[str, str]
) -> None:
    """Writes a file of version 3 atomically, one tensor in memory at a time; the bytes are those that gguf-py writes.

    Args:
        path: the file.
        values: the key-values.
        tensors: by name.
        types: names of types that differ from the tensors' own: `Q8_0`.

    Raises:
        Unsupported: GGUF has no such element type.
    """
    alignment = _alignment(values)
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values)))
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
        offset += _up(_size(tensor.shape, number), alignment)
    with replacing(Path(path)) as file:
        file.write(bytes(head) + bytes(-len(head) % alignment))
        for name, tensor in tensors.items():
            data = tensor.fetch() if _type_number(name, tensor, types) != Q8_0 else encoded("Q8_0", as_array(tensor))
            file.write(data)
            file.write(bytes(-len(data) % alignment))


class _Reader:
    """A file that is read from the front, never beyond its end, never more than a header may take."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0

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


def _read(reader: _Reader, tensors: bool) -> Gguf:
    values, count, version, _ = _keys(reader)
    return _with_tensors(reader, values, count if tensors else 0, version)


def _keys(reader: _Reader) -> tuple[dict[str, Value], int, int, dict[str, int]]:
    """The key-values, how many tensors follow, the version; key -> where its value stands."""
    if reader.take(4, "a magic") != MAGIC:
        raise reader.damaged("not a GGUF file")
    version = reader.number("<I", "a version")
    if version not in (2, 3):
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


def _value(reader: _Reader, number: int, key: str, depth: int = 0) -> Value:
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
        return Value(f"[{name}]", list(struct.unpack(f"<{length}{code[1]}", data)))
    if length * 8 > reader.size - reader.at:
        raise reader.damaged(f"an array of {length} at {key!r}, more than the file could hold")
    return Value(
        f"[{_NAMES.get(inner, 'array')}]", [_value(reader, inner, key, depth + 1).value for _ in range(length)]
    )


def _with_tensors(reader: _Reader, values: dict[str, Value], count: int, version: int) -> Gguf:
    found, _, start, alignment = _entries(reader, values, count)
    tensors = {name: _tensor(reader, name, start, alignment, *found[name]) for name in found}
    _check_apart(reader, found)
    types = {name: PLAIN.get(number, "Q8_0") for name, (_, number, _) in found.items()}
    return Gguf(values, tensors, types, version)


def _entries(
    reader: _Reader, values: dict[str, Value], count: int
) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, int], int, int]:
    """(name -> shape, type, offset; name -> where in the header its type stands; where data begins; the alignment)."""
    alignment = _alignment(values)
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
    return found, places, _up(reader.at, alignment), alignment


def _tensor(
    reader: _Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> Lazy:
    if number not in PLAIN and number != Q8_0:
        why, cure = f"a tensor of GGUF's type {number}", "Write the adapter in F32, F16, BF16 or Q8_0"
        raise Unsupported(why, path=reader.path, where=name, cure=cure)
    _check_place(reader, name, start, alignment, shape, number, offset)
    span = Span(reader.path, start + offset, _size(shape, number))
    if number == Q8_0:
        return Lazy(shape, DTYPES["F32"], lambda: decoded("Q8_0", read_span(span)).tobytes())
    return Lazy(shape, DTYPES[PLAIN[number]], partial(read_span, span), span)


def _check_place(
    reader: _Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> None:
    kind = NUMBERS.get(number)
    if kind is not None and (not shape or shape[-1] % BLOCKS[kind][1]):
        raise reader.damaged(f"rows of {name!r} are no whole blocks of {BLOCKS[kind][1]}")
    size = _size(shape, number)
    if offset % alignment or start + offset + size > reader.size:
        raise reader.damaged(f"{name!r} of {size} bytes at {offset} is not aligned, or lies beyond the end")


def _check_apart(reader: _Reader, found: Mapping[str, tuple[tuple[int, ...], int, int]]) -> None:
    end = 0
    for name, (shape, number, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise reader.damaged(f"{name!r} lies over another tensor")
        end = offset + _size(shape, number)


def _size(shape: Sequence[int], number: int) -> int:
    count = math.prod(shape)
    if number in NUMBERS:
        _, numbers, size = BLOCKS[NUMBERS[number]]
        return count // numbers * size
    return count * DTYPES[PLAIN[number]].itemsize if number in PLAIN else 0


def _type_number(name: str, tensor: Lazy, types: Mapping[str, str]) -> int:
    kind = types.get(name, tensor.dtype.name)
    if kind not in _TYPES:
        raise Unsupported(f"GGUF has no element type {kind}", where=name, cure="Convert the adapter to F32 first")
    return _TYPES[kind]


def _alignment(values: Mapping[str, Value]) -> int:
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else 32
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise Malformed(f"{alignment!r} is no alignment", where=ALIGNMENT, cure="Fetch or write the file again")
    return alignment


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> bytes:
    if not value.type.startswith("["):
        return struct.pack("<I", _NUMBERS[value.type]) + _plain(value.type, value.value)
    inner = value.type[1:-1]
    head = struct.pack("<IIQ", ARRAY, _NUMBERS[inner], len(value.value))
    return head + b"".join(_plain(inner, item) for item in value.value)


def _plain(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "string" else struct.pack(SCALARS[_NUMBERS[kind]][1], value)
