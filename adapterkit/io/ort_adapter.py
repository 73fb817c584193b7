"""Read and write onnxruntime's `.onnx_adapter` files: flatbuffers of named tensors. Every offset and size is checked.

Format: onnxruntime/lora/adapter_format/adapter_schema.fbs, version 1.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, Malformed, Unsupported, storage_error
from .arrange import is_moved
from .atomic import remember, replacing, source_of
from .inputs import has_mark, open_input
from .lazy import DTYPES, Lazy, Span

if TYPE_CHECKING:
    from .lazy import Buffer


MARK = b"TORT"
VERSION = 1

TYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ",
}  # fmt: skip
"""A map from the number that ONNX assigns to an element type, to the name of the element type in `DTYPES`."""

_SIZES = {"<H": 2, "<I": 4, "<i": 4}
"""A map from the `struct` codes of flatbuffer integers to their sizes in bytes."""

_NUMBERS = {name: number for number, name in TYPES.items()}

MAX_PARAMETERS = 1 << 20
MAX_AXES = 64
"""The largest number of axes of a tensor. The limit for safetensors files is the same."""

ALIGNMENT = 16
PAGE, PAGES = 1 << 12, 8
"""The file is read in pages. A page has `PAGE` bytes, and at most `PAGES` pages are kept in memory."""

LARGEST = (1 << 31) - 1
"""The largest flatbuffer in bytes. Flatbuffer offsets have 31 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class OrtAdapter:
    """The content of a file: the tensors by name in the file's order, and two version numbers that the user chose."""

    tensors: Mapping[str, Lazy]
    adapter_version: int = 1
    model_version: int = 1


def is_ort_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the magic bytes of an `.onnx_adapter` file; never raises an error."""
    return has_mark(path, MARK, 4)


def read_ort_adapter(path: str | os.PathLike[str]) -> OrtAdapter:
    """Read an `.onnx_adapter` file. The data of a tensor is read only when the tensor is fetched.

    Raises:
        Malformed: the file is not an `.onnx_adapter` file, an offset or size points outside the file, the name of a
            tensor is not valid, or the size of a tensor does not match its shape.
        Unsupported: `format_version` is unknown, or the element type of a tensor is not in `TYPES` (strings, for
            example).
        StorageError: the file cannot be read.
    """
    buffer = _Buffer(os.fspath(path))
    try:
        if buffer.bytes(4, 4) != MARK:
            raise buffer.damaged("the file is not an .onnx_adapter file of onnxruntime", 4)
        root = buffer.table(buffer.forward(0))
        version = buffer.integer(root, 0)
        if version != VERSION:
            why = f"the file has format_version {version}; only {VERSION} is supported"
            cure = "Write the file again with onnxruntime 1.20 or newer"
            raise Unsupported(why, path=path, where="format_version", cure=cure)
        tensors: dict[str, Lazy] = {}
        for table in buffer.tables(root, 3):
            name = buffer.text(table, 0)
            if not name or name in tensors:
                raise buffer.damaged(f"the tensor name {name!r} is empty, or occurs twice", table.at)
            tensors[name] = _tensor(buffer, table, name)
        return OrtAdapter(tensors, buffer.integer(root, 1), buffer.integer(root, 2))
    finally:
        buffer.close()


def write_ort_adapter(path: str | os.PathLike[str], adapter: OrtAdapter) -> None:
    """Write a file atomically, with one tensor in memory at a time.

    Raises:
        Unsupported: ONNX lacks the element type of a tensor, or the file would exceed the size limit of a flatbuffer.
    """
    plan = _Plan(adapter)
    with replacing(Path(path)) as file:
        at = 0
        for start, data in plan.pieces():
            file.write(bytes(start - at))
            file.write(data)
            at = start + len(data)
    remember(path, {name: leaf for name, leaf in adapter.tensors.items() if is_moved(leaf)}, _tensors_of)


def _tensors_of(path: str) -> Mapping[str, Lazy]:
    return read_ort_adapter(path).tensors


@dataclass(frozen=True, slots=True)
class _FlatTable:
    """A flatbuffer table: its offset in the file, and each field's offset in the table (0 if the field is absent)."""

    at: int
    fields: tuple[int, ...]


class _Buffer:
    """Read bytes and integers at any offset of a file. Refuse to read beyond its end.

    The last few pages are cached, because reading alternates between tables, names and shapes, which
    may be in different pages.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pages: dict[int, bytes] = {}
        self.fields: dict[int, tuple[int, ...]] = {}
        try:
            self.file = open_input(path, buffering=0)
            self.size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise storage_error(error, path) from error

    def close(self) -> None:
        self.file.close()

    def damaged(self, why: str, at: int) -> Malformed:
        return Malformed(why, path=self.path, where=f"byte {at}", cure=DOWNLOAD_OR_WRITE_AGAIN)

    def bytes(self, at: int, count: int) -> bytes:
        if at < 0 or count < 0 or at + count > self.size:
            why = f"{count} bytes from offset {at} extend beyond the end of the file, which has {self.size} bytes"
            raise self.damaged(why, at)
        page, start = divmod(at, PAGE)
        if start + count > PAGE:
            self.file.seek(at)
            return self.file.read(count)
        if page not in self.pages:
            if len(self.pages) == PAGES:
                del self.pages[next(iter(self.pages))]
            self.file.seek(page * PAGE)
            self.pages[page] = self.file.read(PAGE)
        return self.pages[page][start : start + count]

    def number(self, code: str, at: int) -> int:
        # Use int.from_bytes, because struct takes twice as long. A file of 500 tensors has 17,000 integers to read.
        size = _SIZES[code]
        page, start = divmod(at, PAGE)
        page_data = self.pages.get(page, b"")
        if start + size > len(page_data):
            page_data, start = self.bytes(at, size), 0
        return int.from_bytes(page_data[start : start + size], "little", signed=code == "<i")

    def forward(self, at: int) -> int:
        offset = self.number("<I", at)
        if offset < 4 or at + offset >= self.size:
            raise self.damaged(f"the offset {offset} is not valid in a file of {self.size} bytes", at)
        return at + offset

    def table(self, at: int) -> _FlatTable:
        where = at - self.number("<i", at)
        # Several tables usually share a list of field offsets (a vtable), so check each list only once.
        if where in self.fields:
            return _FlatTable(at, self.fields[where])
        size = self.number("<H", where)
        if size < 4 or size % 2 or size > 64:
            raise self.damaged(f"a vtable has {size} bytes; the size must be even and from 4 to 64", where)
        inside = self.number("<H", where + 2)
        fields = struct.unpack(f"<{size // 2 - 2}H", self.bytes(where + 4, size - 4))
        if any(field and field + 4 > inside for field in fields):
            raise self.damaged("a field lies outside its table", where)
        self.fields[where] = fields
        return _FlatTable(at, fields)

    def field(self, table: _FlatTable, index: int) -> int | None:
        offset = table.fields[index] if index < len(table.fields) else 0
        return table.at + offset if offset else None

    def integer(self, table: _FlatTable, index: int) -> int:
        at = self.field(table, index)
        return 0 if at is None else self.number("<i", at)

    def vector(self, table: _FlatTable, index: int, itemsize: int, limit: int) -> tuple[int, int]:
        """Return the offset of the first item of a vector, and the number of items."""
        field = self.field(table, index)
        if field is None:
            return 0, 0
        at = self.forward(field)
        count = self.number("<I", at)
        if count > limit or at + 4 + count * itemsize > self.size:
            raise self.damaged(f"a vector of {count} items is too long, or extends beyond the end of the file", at)
        return at + 4, count

    def text(self, table: _FlatTable, index: int) -> str:
        at, count = self.vector(table, index, 1, 1 << 16)
        try:
            return self.bytes(at, count).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a name is not UTF-8", at) from None

    def tables(self, table: _FlatTable, index: int) -> Iterator[_FlatTable]:
        at, count = self.vector(table, index, 4, MAX_PARAMETERS)
        for item in range(count):
            yield self.table(self.forward(at + 4 * item))


def _tensor(buffer: _Buffer, table: _FlatTable, name: str) -> Lazy:
    at, axes = buffer.vector(table, 1, 8, MAX_AXES)
    shape = struct.unpack(f"<{axes}q", buffer.bytes(at, 8 * axes)) if axes else ()
    number = buffer.integer(table, 2)
    if number not in TYPES:
        why = f"the tensor has ONNX's element type {number}, which is not supported"
        cure = "Write the tensor with another element type, such as float32"
        raise Unsupported(why, path=buffer.path, where=name, cure=cure)
    dtype = DTYPES[TYPES[number]]
    start, count = buffer.vector(table, 3, 1, LARGEST)
    if any(size < 0 for size in shape) or count != math.prod(shape) * dtype.itemsize:
        why = f"{name!r} has {count} bytes, which do not fit its shape {list(shape)} in {dtype}"
        raise buffer.damaged(why, table.at)
    source = source_of(buffer.path, name, dtype, count)
    if source is not None and source.shape == shape:
        return source
    span = Span(buffer.path, start, count)
    return Lazy(shape, dtype, None, span)


class _Plan:
    """Lay out a file: first all tables, then the name, shape and data of each tensor.

    The tables are first because their offsets to names, shapes and data must point forward.
    """

    def __init__(self, adapter: OrtAdapter) -> None:
        self.adapter, self.at = adapter, 8
        self.heads: list[tuple[int, bytes]] = []
        self.numbers: list[tuple[int, Lazy]] = []
        count = len(adapter.tensors)
        vtable = self._place(12, 2)
        root = self._place(20, 4)
        vector = self._place(4 + 4 * count, 4)
        fields = self._place(12, 2)
        tables = [self._place(20, 4) for _ in range(count)]
        self.heads += [
            (0, struct.pack("<I4s", root, MARK)),
            (vtable, struct.pack("<6H", 12, 20, 4, 8, 12, 16)),
            (root, struct.pack("<4iI", root - vtable, VERSION, adapter.adapter_version, adapter.model_version,
                               vector - root - 16)),
            (fields, struct.pack("<6H", 12, 20, 4, 8, 12, 16)),
            (vector, struct.pack(f"<I{count}I", count, *(t - vector - 4 - 4 * i for i, t in enumerate(tables)))),
        ]  # fmt: skip
        for table, (name, tensor) in zip(tables, adapter.tensors.items(), strict=True):
            self._parameter(table, fields, name, tensor)

    def _place(self, size: int, alignment: int, before: int = 0) -> int:
        """Reserve `size` bytes and return their offset. The offset plus `before` is a multiple of `alignment`."""
        start = -(-(self.at + before) // alignment) * alignment - before
        self.at = start + size
        if self.at > LARGEST:
            why = f"the file would exceed {LARGEST} bytes, the limit of a flatbuffer"
            raise Unsupported(why, cure="Write adapterkit's own format, or split the adapter")
        return start

    def _parameter(self, table: int, fields: int, name: str, tensor: Lazy) -> None:
        if tensor.dtype.name not in _NUMBERS:
            raise Unsupported(f"ONNX has no element type {tensor.dtype}", where=name, cure="Convert to F32 first")
        text, axes = name.encode(), len(tensor.shape)
        at = self._place(4 + len(text) + 1, 4)
        dims = self._place(4 + 8 * axes, 8, 4)
        data = self._place(4 + tensor.nbytes, ALIGNMENT, 4)
        number = _NUMBERS[tensor.dtype.name]
        self.heads += [
            (table, struct.pack("<iIIiI", table - fields, at - table - 4, dims - table - 8, number, data - table - 16)),
            (at, struct.pack("<I", len(text)) + text + b"\0"),
            (dims, struct.pack(f"<I{axes}q", axes, *tensor.shape)),
            (data, struct.pack("<I", tensor.nbytes)),
        ]
        self.numbers.append((data + 4, tensor))

    def pieces(self) -> Iterator[tuple[int, Buffer]]:
        """Yield (offset, bytes) pairs in file order. Each tensor is fetched just before its bytes are yielded."""
        order: list[tuple[int, int, Any]] = [(at, len(data), data) for at, data in self.heads]
        order += [(at, tensor.nbytes, tensor) for at, tensor in self.numbers]
        order.sort(key=lambda piece: piece[:2])
        for at, _, piece in order:
            data = piece.fetch() if isinstance(piece, Lazy) else piece
            if isinstance(piece, Lazy) and len(data) != piece.nbytes:
                why = f"reading the tensor gave {len(data)} bytes, but its shape needs {piece.nbytes}"
                raise Malformed(
                    why,
                    where=f"byte {at}",
                    cure="Run the same command again: the source file changed while it was read",
                )
            yield at, data
