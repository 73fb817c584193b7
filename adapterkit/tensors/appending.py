"""Tensors one behind another in a file: those that are spans of files are copied, adjoining ones at once."""

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
"""Bytes that are gathered before they are written, of tensors that are no spans."""

AHEAD = 16 << 20
"""Tensors that are no spans and not larger are computed while the one before them is written."""


def append(file: str, start: int, tensors: Iterable[tuple[str, Lazy]], path: str | os.PathLike[str]) -> None:
    """Writes tensors one behind another; memory holds one, and a small one or a few.

    Args:
        file: the path of an existing file.
        start: the byte at which the first begins.
        tensors: with their names, for messages.
        path: what the file will be, for messages.

    Raises:
        StorageError: a file that holds tensors cannot be read.
        Corrupt: such a file has become shorter.
        Malformed: a tensor is not of the size it promised.
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
    """A tensor of which a thread may be working out the bytes already."""

    def __init__(self, name: str, tensor: Lazy, pool: ThreadPoolExecutor) -> None:
        self.name, self.tensor = name, tensor
        self.span = tensor.span if tensor.span is None or tensor.span.path not in ELSEWHERE else None
        self.early: Future[Buffer] | None = None
        if self.span is None and tensor.nbytes <= AHEAD:
            self.early = pool.submit(tensor.fetch)

    def fetch(self) -> Buffer:
        return self.tensor.fetch() if self.early is None else self.early.result()


def _begun(tensors: Iterable[tuple[str, Lazy]], pool: ThreadPoolExecutor) -> Iterator[_Begun]:
    """Each tensor, when the one behind it is begun."""
    last: _Begun | None = None
    for name, tensor in tensors:
        following = _Begun(name, tensor, pool)
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def _pieces(tensors: Iterable[_Begun], path: str | os.PathLike[str]) -> Iterator[Span | Buffer]:
    """Runs of files, as long as they are, and bytes between them."""
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
