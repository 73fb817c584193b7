"""What files were written from, for as long as the writer proves itself.

A file that is read back right after it was written is compared by handles where tensors were only moved: its header is
read from the disk, its handles lead to what the tensors were written from, and some bytes of the disk are compared with
those. Some containers are written past the page cache, so that each read of a tensor would cost 70 us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dtypes import DType
    from .lazy import Lazy


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A file that was written.

    Attributes:
        sources: name -> what the tensor of that name was written from.
        read: reads the file's tensors from the disk, as handles on spans of it.
    """

    sources: Mapping[str, Lazy]
    read: Callable[[str], Mapping[str, Lazy]]

    def on_disk(self, path: str) -> Mapping[str, Lazy]:
        """The tensors of the file as handles that lead to the disk."""
        token = _WRITTEN.set(None)
        try:
            return self.read(path)
        finally:
            _WRITTEN.reset(token)


_WRITTEN: ContextVar[dict[str, Written] | None] = ContextVar("_WRITTEN", default=None)


@contextmanager
def sources_remembered() -> Iterator[dict[str, Written]]:
    """Inside the block, handles on tensors of a file that was written inside it lead to what they were written from.

    Yields:
        path of each file -> what was written.
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
    """Remember what a file was written from, inside `sources_remembered`; see `Written`."""
    files = _WRITTEN.get()
    if files is not None:
        files[os.fspath(path)] = Written(sources, read)


def source_of(path: str, name: str, dtype: DType, nbytes: int) -> Lazy | None:
    """What a tensor of a file was written from; None where that is not known, or is not what the header says."""
    written = (_WRITTEN.get() or {}).get(path)
    source = None if written is None else written.sources.get(name)
    return source if source is not None and (source.dtype, source.nbytes) == (dtype, nbytes) else None
