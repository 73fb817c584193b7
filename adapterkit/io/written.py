"""Remember the source tensors of a written file, while the writer checks its output.

A writer reads each file back after writing it. If the tensors were only moved, a full comparison is not needed. The
header is read from the disk, and a sample of bytes is compared with the disk. All other reads return the source tensors
from memory: some files are written around the page cache, so reading a tensor from the disk would take 70 us.
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
    """A file that was written.

    Attributes:
        sources: the source tensors, by tensor name in the file.
        read: a function that returns the tensors in the file as lazy tensors, which read from the disk.
    """

    sources: Mapping[str, Lazy]
    read: Callable[[str], Mapping[str, Lazy]]

    def on_disk(self, path: str) -> Mapping[str, Lazy]:
        """Return the tensors in the file as lazy tensors, which read from the disk."""
        token = _WRITTEN.set(None)
        try:
            return self.read(path)
        finally:
            _WRITTEN.reset(token)


_WRITTEN: ContextVar[dict[str, Written] | None] = ContextVar("_WRITTEN", default=None)


@contextmanager
def sources_remembered() -> Iterator[dict[str, Written]]:
    """Remember the source tensors of all files that are written in the block; reading a file then returns them.

    Yields:
        A map from the path of each written file to its `Written`.
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
    """Inside `sources_remembered`, remember the source tensors of a file that was written."""
    files = _WRITTEN.get()
    if files is not None:
        files[os.fspath(path)] = Written(sources, read)


def sources_of(path: str) -> Mapping[str, Lazy]:
    """Return the source tensors of a written file by name; empty if they are not remembered."""
    written = (_WRITTEN.get() or {}).get(path)
    return {} if written is None else written.sources


def source_of(path: str, name: str, dtype: DType, nbytes: int) -> Lazy | None:
    """Return the source tensor of an entry; None if it is not remembered, or differs from the header."""
    source = sources_of(path).get(name)
    return source if source is not None and (source.dtype, source.nbytes) == (dtype, nbytes) else None
