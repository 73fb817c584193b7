"""Read and write safetensors files without loading all of their tensors into memory."""

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

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, WRITE_AGAIN, Corrupt, Malformed, storage_error
from .atomic import remember, replacing, sources_of
from .direct import OpenFiles, Writer
from .inputs import kept, open_input
from .lazy import DTYPES, ELSEWHERE, Buffer, DType, Lazy, Shape, Span
from .strict_json import load_table

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .strict_json import JsonValue


SMALL = 1 << 20
"""A computed tensor with fewer bytes than this is added to a buffer. The buffer is written when it has at least this
many bytes, or when the next tensor is not added to the buffer."""

AHEAD = 16 << 20
"""A tensor of up to this many bytes is computed while the previous tensor is written."""


def append(file: str, start: int, tensors: Iterable[tuple[str, Lazy]], path: str | os.PathLike[str]) -> None:
    """Write tensors one after the other into a file. At any time, one large or a few small tensors are in memory.

    Args:
        file: the path of an existing file.
        start: the byte offset of the first tensor.
        tensors: (name, tensor) pairs. The names are used only in error messages.
        path: the final path of the file. It is used only in error messages.

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
        # Copy the span only if the local file contains the data. A sparse file whose data is elsewhere, such as on a
        # hub, has zeros in the span. So the bytes of its tensors must be fetched.
        self.span = tensor.span if tensor.span is None or tensor.span.path not in ELSEWHERE else None
        self.early: Future[Buffer] | None = None
        # Compute a tensor of over `AHEAD` bytes only when it is written, so that only one such tensor is in memory.
        if self.span is None and tensor.nbytes <= AHEAD:
            self.early = pool.submit(tensor.fetch)

    def fetch(self) -> Buffer:
        return self.tensor.fetch() if self.early is None else self.early.result()


def _begun(tensors: Iterable[tuple[str, Lazy]], pool: ThreadPoolExecutor) -> Iterator[_Begun]:
    """Yield the tensors in order. While the caller writes a tensor, the next one is already being computed."""
    last: _Begun | None = None
    for name, tensor in tensors:
        following = _Begun(name, tensor, pool)
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def _pieces(tensors: Iterable[_Begun], path: str | os.PathLike[str]) -> Iterator[Span | Buffer]:
    """Yield spans of source files and buffers of computed bytes, in output order. Adjacent spans are merged."""
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
        why = f"reading the tensor gave {len(data)} bytes, but its shape needs {promised}"
        raise Malformed(
            why,
            path=path,
            where=begun.name,
            cure="Run the same command again: the source file changed while it was read",
        )
    return data


_CHANGED = "Read the file again: it has changed"


# Read and write safetensors files without loading all of their tensors into memory.
#
# Before any data is read, the lengths, offsets, shapes and dtypes in the header are compared with each other, and with
# the size of the file. Format: https://huggingface.co/docs/safetensors (format section).


MAX_HEADER = 100_000_000
"""The longest header that the safetensors format allows, in bytes."""

MAX_AXES = 64
"""The largest number of axes of a tensor. torch has the same limit."""

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
    """The checked header of a file: the entries of its tensors in file order, and its metadata."""

    path: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Raises:
        Malformed: the header is not valid, or it contradicts itself or the size of the file.
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
    """Return a lazy tensor for each entry of a header, in file order.

    Usually, a lazy tensor reads its bytes from the file. But a writer that checks its new file may keep the source
    tensors, which it wrote to the file. Then `sources_of` returns them, and a lazy tensor reads its source tensor, not
    the file.
    """
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
    """Return the header of a file that stores the given tensors in the given order, without gaps.

    The header includes its length prefix and its padding.

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
        why = f"a tensor name or the metadata has half of a surrogate pair ({error.object[error.start : error.end]!r})"
        raise Malformed(why, where="header", cure="Rename the tensor, or correct the metadata") from None
    # Pad with spaces like the safetensors library, so that the data starts at a multiple of 8 bytes.
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write(path: str | os.PathLike[str], tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Write a file atomically: the header first, then the tensors. See `append` for the memory that this takes.

    The tensors have the same order as in files of the safetensors library: by dtype, widest first, and then by name. So
    the same tensors always give the same bytes, and the library would write the same bytes.
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
        raise Malformed(why, path=path, where="header length", cure=DOWNLOAD_OR_WRITE_AGAIN)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER or 8 + length > size:
        if prefix[:1] in b"{[<#" or prefix.startswith((b"version ", b"---")):
            # Report that the file is text. Otherwise, the first eight characters would be taken for a length, and the
            # error would state a length above 10^18.
            cure = "Pass the folder, or the weight file in it"
            if prefix.startswith(b"version "):
                cure = "The file is a Git LFS pointer: download the weights with 'git lfs pull'"
            raise Malformed("the file is text, not weights", path=path, where="header length", cure=cure)
        raise Malformed(
            f"the header claims {length} bytes, but the file has {size}",
            path=path,
            where="header length",
            cure=DOWNLOAD_OR_WRITE_AGAIN,
        )
    return int(length)


def _parse(raw: bytes, path: str) -> tuple[dict[str, JsonValue], bool]:
    """Parse the header. Also return whether all values in it are strings or non-negative integers; see `load_table`."""
    try:
        fields, regular = load_table(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(
            f"the header is not valid JSON ({error})", path=path, where="header", cure=DOWNLOAD_OR_WRITE_AGAIN
        ) from error
    if not isinstance(fields, dict):
        raise Malformed("the header is not a JSON object", path=path, where="header", cure=DOWNLOAD_OR_WRITE_AGAIN)
    return fields, regular


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:
        # Accept null: MLX writes null if a file has no metadata.
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise Malformed("metadata must map strings to strings", path=path, where="__metadata__", cure=WRITE_AGAIN)
    return value


def _entries(fields: Mapping[str, Any], start: int, path: str, regular: bool) -> list[Entry]:
    """Check all entries of a header.

    Args:
        fields: the parsed header: tensor name -> object with `dtype`, `shape` and `data_offsets`.
        start: the byte offset in the file at which the data of the tensors begins.
        path: the path of the file, for error messages.
        regular: True if all values in the header are strings or non-negative integers. If so, each pair of dtype and
            shape is checked only once, because tens of thousands of tensors share a few dozen shapes.
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
            "the entry must have exactly dtype, shape and data_offsets", path=path, where=name, cure=WRITE_AGAIN
        )
    dtype, shape, offsets = DTYPES.get(str(spec["dtype"])), spec["shape"], spec["data_offsets"]
    if dtype is None:
        known = ", ".join(DTYPES)
        raise Malformed(f"unknown dtype {spec['dtype']!r}", path=path, where=name, cure=f"Known: {known}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        why = f"shape and data_offsets must be lists of up to {MAX_AXES} non-negative integers"
        raise Malformed(why, path=path, where=name, cure=WRITE_AGAIN)
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise Malformed(
            f"{dtype} {list(shape)} takes {nbytes} bytes, but its data_offsets span {offsets[1] - offsets[0]}",
            path=path, where=name, cure=WRITE_AGAIN,
        )  # fmt: skip
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_AXES:
        return False
    # Compare types instead of using isinstance: in Python, JSON's true and false are instances of int.
    return all(type(n) is int and 0 <= n < 1 << 63 for n in value)


_FIELDS = {"dtype", "shape", "data_offsets"}


def _position(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _check_cover(entries: list[Entry], start: int, size: int, path: str) -> None:
    # Refuse gaps, as the format requires. Bytes in a gap could make the file a valid file of another format as well.
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the previous tensor" if entry.offset < end else "starts after a gap"
            raise Malformed(f"the tensor's data {fault}", path=path, where=entry.name, cure=WRITE_AGAIN)
        end += entry.nbytes
    if end != size:
        fault = "is cut short" if end > size else "has trailing bytes"
        why = f"the file {fault}: it has {size} bytes, but its header describes {end} bytes"
        raise Malformed(why, path=path, where=f"byte {min(end, size)}", cure=DOWNLOAD_OR_WRITE_AGAIN)
