"""Remember the tensors that a file was written from, while a writer checks its own output.

A writer reads each file back right after writing it. If its tensors were only moved, a full comparison is not needed:
the header is read from the disk, a sample of bytes is compared with the disk, and all other reads return the tensors
that were written. Some containers are written bypassing the page cache, so reading each tensor from the disk would take
70 us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lazy import DType, Lazy


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A written file.

    Attributes:
        sources: name -> the tensor that was written under that name.
        read: a function that reads the file's tensors from the disk, as lazy tensors with spans in the file.
    """

    sources: Mapping[str, Lazy]
    read: Callable[[str], Mapping[str, Lazy]]

    def on_disk(self, path: str) -> Mapping[str, Lazy]:
        """Return the file's tensors as lazy tensors that read from the disk."""
        token = _WRITTEN.set(None)
        try:
            return self.read(path)
        finally:
            _WRITTEN.reset(token)


_WRITTEN: ContextVar[dict[str, Written] | None] = ContextVar("_WRITTEN", default=None)


@contextmanager
def sources_remembered() -> Iterator[dict[str, Written]]:
    """Inside the block, reading a file that was written in the same block returns the tensors that were written.

    Yields:
        A map from the path of each file to its `Written`.
    """
    files: dict[str, Written] = {}
    token = _WRITTEN.set(files)
    try:
        yield files
    finally:
        _WRITTEN.reset(token)


def remember(
    path: str | os.PathLike[str], sources: Mapping[str, Lazy], read: Callable[[str], Mapping[str, Lazy]]
) -> None:
    """Remember the tensors that a file was written from, if inside `sources_remembered`; see `Written`."""
    files = _WRITTEN.get()
    if files is not None:
        files[os.fspath(path)] = Written(sources, read)


def sources_of(path: str) -> Mapping[str, Lazy]:
    """Return the tensors that a file was written from, by name; empty if unknown."""
    written = (_WRITTEN.get() or {}).get(path)
    return {} if written is None else written.sources


def source_of(path: str, name: str, dtype: DType, nbytes: int) -> Lazy | None:
    """Return the tensor that an entry was written from; None if unknown, or if the header contradicts it."""
    source = sources_of(path).get(name)
    return source if source is not None and (source.dtype, source.nbytes) == (dtype, nbytes) else None
