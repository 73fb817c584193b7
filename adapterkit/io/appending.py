"""Append tensors to a file back to back. Tensors that are spans of files are copied, adjacent spans in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from ..errors import Corrupt, Malformed, storage_error
from .copying import OpenFiles
from .direct import Writer
from .lazy import ELSEWHERE, Buffer, Lazy, Span

if TYPE_CHECKING:
    from concurrent.futures import Future

SMALL = 1 << 20
"""Computed tensors are collected up to this many bytes before they are written."""

AHEAD = 16 << 20
"""Computed tensors of up to this many bytes are computed while the previous tensor is written."""


def append(file: str, start: int, tensors: Iterable[tuple[str, Lazy]], path: str | os.PathLike[str]) -> None:
    """Write tensors back to back. Memory holds one large tensor, or a few small ones.

    Args:
        file: the path of an existing file.
        start: the byte offset of the first tensor.
        tensors: (name, tensor) pairs; the names are for messages.
        path: the final path of the file, for messages.

    Raises:
        StorageError: a source file cannot be read.
        Corrupt: a source file has become shorter.
        Malformed: a tensor does not have the promised size.
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
        # A file with its data elsewhere is sparse on disk: its span must be fetched, not copied.
        self.span = tensor.span if tensor.span is None or tensor.span.path not in ELSEWHERE else None
        self.early: Future[Buffer] | None = None
        # Larger tensors wait for their turn, so that memory holds only one of them.
        if self.span is None and tensor.nbytes <= AHEAD:
            self.early = pool.submit(tensor.fetch)

    def fetch(self) -> Buffer:
        return self.tensor.fetch() if self.early is None else self.early.result()


def _begun(tensors: Iterable[tuple[str, Lazy]], pool: ThreadPoolExecutor) -> Iterator[_Begun]:
    """Yield each tensor after the next one has been started, so that computing and writing overlap."""
    last: _Begun | None = None
    for name, tensor in tensors:
        following = _Begun(name, tensor, pool)
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def _pieces(tensors: Iterable[_Begun], path: str | os.PathLike[str]) -> Iterator[Span | Buffer]:
    """Yield source spans, merged while they are adjacent, and buffers of computed bytes, in file order."""
    span: Span | None = None
    held = bytearray()
    for tensor in tensors:
        here = tensor.span
        if span is not None and here is not None and here == Span(span.path, span.offset + span.nbytes, here.nbytes):
            span = Span(span.path, span.offset, span.nbytes + here.nbytes)
            continue
        if span is not None:
            yield span
        span = here
        if held and (here is not None or len(held) >= SMALL):
            yield held
            held = bytearray()
        if here is None:
            data = _exact(tensor, path)
            if len(data) < SMALL:
                held += data
                continue
            yield from (held, data) if held else (data,)
            held = bytearray()
    yield from (piece for piece in (span, held) if piece)


def _copy(sources: OpenFiles, span: Span, writer: Writer) -> None:
    try:
        source = sources(span.path)
    except OSError as error:
        raise storage_error(error, span.path) from error
    try:
        writer.copy(source, span.offset, span.nbytes)
    except EOFError:
        why = "it ends before its last tensor"
        raise Corrupt(why, path=span.path, where=f"byte {span.offset}", cure=_CHANGED) from None


def _exact(begun: _Begun, path: str | os.PathLike[str]) -> Buffer:
    data, promised = begun.fetch(), begun.tensor.nbytes
    if len(data) != promised:
        why = f"{len(data)} bytes where {promised} were promised"
        raise Malformed(why, path=path, where=begun.name, cure="The source changed while being read; run again")
    return data


_CHANGED = "It changed while in use; read it anew"
