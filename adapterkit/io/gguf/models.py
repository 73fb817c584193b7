"""GGUF model files with tensors of any type: locate the tensors, and rewrite headers for other types."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import AdapterkitError, Unsupported, storage_error
from ..ggml_blocks import BLOCKS, NUMBERS
from ..inputs import open_input
from ..lazy import Span
from .headers import Reader, check_apart, check_place, read_entries, read_keys
from .layout import PLAIN, TYPES, Value, raw_size, size_of, up

FILE_TYPE = "general.file_type"

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""Dominant type of a file's matrices -> llama.cpp's number for `general.file_type`."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The header of a model file, and the location of its tensors.

    Attributes:
        values: key -> value.
        types: tensor name -> type name, in the file's order.
        shapes: tensor name -> shape in numpy's axis order.
        spans: tensor name -> its bytes, including the padding before the next tensor.
        alignment: the alignment of the data, in bytes.
        raw: the bytes of the header.
        entries: tensor name -> offset of its type field in the header; the field of its data offset follows.
        places: key -> offset of its value in the header.
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
        """Return the header for tensors of other types, packed in the same order, with a matching file type."""
        # Patch the original bytes instead of encoding anew: all key-values then stay exactly as they were.
        if all(kinds.get(name, kind) == kind for name, kind in self.types.items()):
            return self.raw
        head, offset = bytearray(self.raw), 0
        for name in self.spans:
            kind = kinds.get(name, self.types[name])
            struct.pack_into("<IQ", head, self.entries[name], TYPES[kind], offset)
            offset += up(raw_size(kind, self.shapes[name]), self.alignment)
        said = FILE_TYPES.get(self._most({name: kinds.get(name, kind) for name, kind in self.types.items()}))
        if said is not None and FILE_TYPE in self.values and self.values[FILE_TYPE].type == "u32":
            struct.pack_into("<I", head, self.places[FILE_TYPE], said)
        return bytes(head)

    def _most(self, kinds: Mapping[str, str]) -> str:
        """Return the type that most numbers in matrices have."""
        counts: dict[str, int] = {}
        for name, kind in kinds.items():
            if len(self.shapes[name]) > 1:
                counts[kind] = counts.get(kind, 0) + math.prod(self.shapes[name])
        return max(counts, key=lambda kind: counts[kind], default="")


def read_model(path: str | os.PathLike[str]) -> Model:
    """Read the header of a model whose tensors may have any type in `BLOCKS` or `PLAIN`.

    Raises:
        Malformed: data lies outside of the file, or the tensors are not contiguous.
        Unsupported: another version, byte order or type.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            reader = Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size)
            values, count, _, places = read_keys(reader)
            found, entries, start, alignment = read_entries(reader, values, count)
            check_apart(reader, found)
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


def _spans(
    reader: Reader, found: Mapping[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, Span]:
    spans, end = {}, start
    for name, (shape, number, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        check_place(reader, name, start, alignment, shape, number, offset)
        if start + offset != end:
            raise reader.damaged(f"{name!r} does not begin where the tensor before it ends")
        end = min(start + offset + up(size_of(shape, number), alignment), reader.size)
        spans[name] = Span(reader.path, start + offset, end - start - offset)
    return spans


def _type_name(reader: Reader, name: str, number: int) -> str:
    kind = PLAIN.get(number) or NUMBERS.get(number)
    if kind is None:
        cure = f"Known: {', '.join([*PLAIN.values(), *BLOCKS])}; let llama.cpp quantize the model to one of them"
        raise Unsupported(f"a tensor of GGUF's type {number}", path=reader.path, where=name, cure=cure)
    return kind
