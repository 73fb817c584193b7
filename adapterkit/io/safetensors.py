"""Read and write safetensors files without loading all their tensors into memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Corrupt, Malformed, storage_error
from .atomic import remember, replacing, sources_of
from .direct import OpenFiles, Writer
from .inputs import kept, open_input
from .lazy import DTYPES, ELSEWHERE, Buffer, DType, Lazy, Shape, Span
from .strict_json import load_table

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .strict_json import JsonValue


SMALL = 1 << 20
"""Computed tensors are collected up to this many bytes before they are written."""

AHEAD = 16 << 20
"""Computed tensors of up to this many bytes are computed while the previous tensor is written."""


def append(file: str, start: int, tensors: Iterable[tuple[str, Lazy]], path: str | os.PathLike[str]) -> None:
    """Write tensors one after the other into a file. At most one large tensor, or a few small tensors, are in memory.

    Args:
        file: the path of an existing file.
        start: the byte offset of the first tensor.
        tensors: (name, tensor) pairs; the names are for messages.
        path: the final path of the file, for messages.

    Raises:
        StorageError: a source file cannot be read.
        Corrupt: a source file has become shorter.
        Malformed: a tensor does not have the size that its shape needs.
        OSError: the file cannot be written.
    """
    with closing(OpenFiles()) as sources, closing(Writer()) as writer, ThreadPoolExecutor(1) as pool:
        writer.begin(file, start)
        for piece in _pieces(_begun(tensors, pool), path):
            if isinstance(piece, Span):
                _copy(sources, piece, writer)
            else:
                writer.write(memoryview(piece))
        writer.finish().result()


class _Begun:
    """A tensor whose bytes a worker thread may already be computing."""

    def __init__(self, name: str, tensor: Lazy, pool: ThreadPoolExecutor) -> None:
        self.name, self.tensor = name, tensor
        # Fetch the bytes if the file is sparse and its data is elsewhere: copying the span would copy zeros.
        self.span = tensor.span if tensor.span is None or tensor.span.path not in ELSEWHERE else None
        self.early: Future[Buffer] | None = None
        # Start larger tensors only when they are written, so that memory holds only one of them.
        if self.span is None and tensor.nbytes <= AHEAD:
            self.early = pool.submit(tensor.fetch)

    def fetch(self) -> Buffer:
        return self.tensor.fetch() if self.early is None else self.early.result()


def _begun(tensors: Iterable[tuple[str, Lazy]], pool: ThreadPoolExecutor) -> Iterator[_Begun]:
    """Yield the tensors in order; start to compute the next tensor before each yield, while the caller writes."""
    last: _Begun | None = None
    for name, tensor in tensors:
        following = _Begun(name, tensor, pool)
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def _pieces(tensors: Iterable[_Begun], path: str | os.PathLike[str]) -> Iterator[Span | Buffer]:
    """Yield spans of source files and buffers of computed bytes, in file order; adjacent spans are merged."""
    span: Span | None = None
    buffer = bytearray()
    for tensor in tensors:
        here = tensor.span
        if span is not None and here is not None and here == Span(span.path, span.offset + span.nbytes, here.nbytes):
            span = Span(span.path, span.offset, span.nbytes + here.nbytes)
            continue
        if span is not None:
            yield span
        span = here
        if buffer and (here is not None or len(buffer) >= SMALL):
            yield buffer
            buffer = bytearray()
        if here is None:
            data = _exact(tensor, path)
            if len(data) < SMALL:
                buffer += data
                continue
            yield from (buffer, data) if buffer else (data,)
            buffer = bytearray()
    yield from (piece for piece in (span, buffer) if piece)


def _copy(sources: OpenFiles, span: Span, writer: Writer) -> None:
    try:
        source = sources(span.path)
    except OSError as error:
        raise storage_error(error, span.path) from error
    try:
        writer.copy(source, span.offset, span.nbytes)
    except EOFError:
        why = "the file ends before its last tensor"
        raise Corrupt(why, path=span.path, where=f"byte {span.offset}", cure=_CHANGED) from None


def _exact(begun: _Begun, path: str | os.PathLike[str]) -> Buffer:
    data, promised = begun.fetch(), begun.tensor.nbytes
    if len(data) != promised:
        why = f"the tensor gave {len(data)} bytes, but its shape needs {promised}"
        raise Malformed(why, path=path, where=begun.name, cure="The source changed while being read; run again")
    return data


_CHANGED = "It changed while in use; read it again"


# Read and write safetensors files without loading all their tensors into memory.
#
# Before the reader reads any data, it compares the lengths, offsets, shapes and dtypes in the header with each other,
# and with the size of the file. Format: https://huggingface.co/docs/safetensors (format section).


MAX_HEADER = 100_000_000
"""Longest header that the safetensors format allows: 100 MB."""

MAX_AXES = 64
"""The largest number of axes of a tensor, which is torch's own limit."""

ALIGNMENT = 8


class Entry(NamedTuple):
    """The dtype, shape and location of one tensor; `offset` counts bytes from the start of the file."""

    name: str
    dtype: DType
    shape: Shape
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of a file: the entries of tensors in file order, and the metadata."""

    path: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Raises:
        Malformed: the file has no valid header, or the header contradicts itself or the file's size.
        StorageError: the file cannot be read.
    """
    path = os.fspath(path)
    return kept("safetensors", path, lambda: _read_header(path))


def _read_header(path: str) -> Header:
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), size, path)
            raw = file.read(length)
    except OSError as error:
        raise storage_error(error, path) from error
    fields, regular = _parse(raw, path)
    metadata = _metadata(fields.pop("__metadata__", {}), path)
    entries = _entries(fields, 8 + length, path, regular)
    entries.sort(key=_position)
    _check_cover(entries, 8 + length, size, path)
    return Header(path, {entry.name: entry for entry in entries}, metadata, size)


def read(path: str | os.PathLike[str]) -> dict[str, Lazy]:
    """Return all tensors of a file as lazy tensors, in file order."""
    return handles(read_header(path))


def handles(header: Header) -> dict[str, Lazy]:
    """Return a lazy tensor for each entry of a header, in file order; `read_span` reads the bytes."""
    path, leaves = header.path, {}
    sources = sources_of(path)
    for name, entry in header.entries.items():
        source = sources.get(name) if sources else None
        if source is not None and (source.dtype, source.nbytes) == (entry.dtype, entry.nbytes):
            leaves[name] = Lazy(entry.shape, entry.dtype, source.source, source.span, source.part)
        else:
            leaves[name] = Lazy(entry.shape, entry.dtype, None, Span(path, entry.offset, entry.nbytes))
    return leaves


def encode_header(tensors: Iterable[tuple[str, DType, Shape]], metadata: Mapping[str, str]) -> bytes:
    """Return the header bytes, with length prefix and padding, for tensors packed in the given order.

    Raises:
        Malformed: a name or the metadata cannot be encoded as UTF-8.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        why = f"a name or the metadata contains half of a surrogate pair ({error.object[error.start : error.end]!r})"
        raise Malformed(why, where="header", cure="Rename it, or omit it") from None
    # Pad with spaces like the safetensors library, so that the data starts at a multiple of 8 bytes.
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write(path: str | os.PathLike[str], tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Write a file atomically: the header first, then the tensors. For the memory use, see `append`.

    The tensors have the same order as in files of the safetensors library: widest dtype first, then by name. So the
    same tensors always give the same bytes, and the library writes the same bytes.
    """
    rank = {dtype: -position for position, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype.name], name.encode()))
    header = encode_header(((n, tensors[n].dtype, tensors[n].shape) for n in order), metadata)
    with replacing(Path(path)) as file:
        file.write(header)
        file.flush()
        append(file.name, len(header), ((name, tensors[name]) for name in order), path)
    remember(path, tensors, read)


def _header_length(prefix: bytes, size: int, path: str) -> int:
    if len(prefix) < 8:
        why = f"the file has {size} bytes, too few for a safetensors file"
        raise Malformed(why, path=path, where="header length", cure=_AGAIN)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER or 8 + length > size:
        if prefix[:1] in b"{[<#" or prefix.startswith((b"version ", b"---")):
            # Report that the file is text. Otherwise the error would state a length above 10^18, from the first eight
            # bytes of the text.
            cure = "Pass the folder, or its weight file"
            if prefix.startswith(b"version "):
                cure = "It is a pointer of Git LFS: fetch the file itself with 'git lfs pull'"
            raise Malformed("the file is text, not weights", path=path, where="header length", cure=cure)
        raise Malformed(
            f"the header claims {length} bytes, but the file has {size}", path=path, where="header length", cure=_AGAIN
        )
    return int(length)


def _parse(raw: bytes, path: str) -> tuple[dict[str, JsonValue], bool]:
    """Parse the header; also return whether all its values are strings or non-negative integers; see `load_table`."""
    try:
        fields, regular = load_table(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the header is not valid JSON ({error})", path=path, where="header", cure=_AGAIN) from error
    if not isinstance(fields, dict):
        raise Malformed("the header is not a JSON object", path=path, where="header", cure=_AGAIN)
    return fields, regular


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:
        # Accept null: MLX writes it if a file has no metadata.
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise Malformed("metadata must map strings to strings", path=path, where="__metadata__", cure=_REWRITE)
    return value


def _entries(fields: Mapping[str, Any], start: int, path: str, regular: bool) -> list[Entry]:
    """Check all entries of a header.

    Args:
        fields: by tensor name, the dtype, shape and offsets as in the file.
        start: the offset of the file's data.
        path: the file, for errors.
        regular: True if all values in the header are strings or non-negative integers. Then dtype and shape are checked
            once for each pair: tens of thousands of tensors share a few dozen shapes.
    """
    entries = []
    forms: dict[tuple[str, Shape], tuple[DType, Shape, int]] = {}
    for name, spec in fields.items():
        form, first = None, 0
        if regular:
            try:
                shape, (first, last) = spec["shape"], spec["data_offsets"]
                form = forms[spec["dtype"], tuple(shape)]
                if type(shape) is not list or len(spec) != len(_FIELDS) or last - first != form[2]:
                    form = None
            except (KeyError, TypeError, ValueError):
                form = None
        if form is None:
            entry = _entry(name, spec, start, path)
            forms[entry.dtype.name, entry.shape] = entry.dtype, entry.shape, entry.nbytes
        else:
            entry = Entry(name, form[0], form[1], start + first, form[2])
        entries.append(entry)
    return entries


def _entry(name: str, spec: object, start: int, path: str) -> Entry:
    if not isinstance(spec, dict) or spec.keys() != _FIELDS:
        raise Malformed(
            "the entry must have exactly dtype, shape and data_offsets", path=path, where=name, cure=_REWRITE
        )
    dtype, shape, offsets = DTYPES.get(str(spec["dtype"])), spec["shape"], spec["data_offsets"]
    if dtype is None:
        known = ", ".join(DTYPES)
        raise Malformed(f"unknown dtype {spec['dtype']!r}", path=path, where=name, cure=f"Known: {known}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        why = f"shape and data_offsets must be lists of up to {MAX_AXES} non-negative integers"
        raise Malformed(why, path=path, where=name, cure=_REWRITE)
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise Malformed(
            f"{dtype} {list(shape)} takes {nbytes} bytes, but its data_offsets span {offsets[1] - offsets[0]}",
            path=path, where=name, cure=_REWRITE,
        )  # fmt: skip
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_AXES:
        return False
    # Compare types instead of using isinstance: JSON's true and false are integers in Python.
    return all(type(n) is int and 0 <= n < 1 << 63 for n in value)


_FIELDS = {"dtype", "shape", "data_offsets"}


def _position(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _check_cover(entries: list[Entry], start: int, size: int, path: str) -> None:
    # Refuse gaps, as the format requires: bytes in a gap could make the file valid in a second format.
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the previous tensor" if entry.offset < end else "leaves a gap before it"
            raise Malformed(f"its data {fault}", path=path, where=entry.name, cure=_REWRITE)
        end += entry.nbytes
    if end != size:
        fault = "is cut short" if end > size else "has trailing bytes"
        why = f"the header describes {end} bytes, but the file {fault} at {size}"
        raise Malformed(why, path=path, where=f"byte {min(end, size)}", cure=_AGAIN)


_AGAIN = "Fetch or write the file again"
_REWRITE = "Write the file again with the tool that made it"
