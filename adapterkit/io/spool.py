"""Keep computed tensors until they are written: the first ones in memory, all others in a temporary file.

Combining eight adapters with 224 targets of 4096 x 4096 can take a gigabyte, because the ranks add up. The output can
be written only after all targets have been computed, because the last target may still raise an error.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, cast

from ..errors import storage_error
from .computed import held, rounded
from .lazy import Lazy

if TYPE_CHECKING:
    from .computed import Array
    from .lazy import DType

IN_MEMORY = 64 << 20
"""The most bytes of tensors in memory; further tensors go to the temporary file."""


class Spool:
    """Keep tensors in memory and in a temporary file, which is removed with its last tensor. Threads may share a spool.

    Args:
        memory: the most bytes of tensors in memory.
    """

    def __init__(self, memory: int = IN_MEMORY) -> None:
        self.memory, self._used, self._end = memory, 0, 0
        self._lock = Lock()
        self._file: BinaryIO | None = None

    def held(self, values: Array, dtype: DType) -> Lazy:
        """Return a lazy tensor with the given numbers, rounded once to `dtype`.

        Raises:
            Malformed: a number overflows the dtype, or is not finite.
            StorageError: there is no space for the temporary file.
        """
        kept = rounded(values, dtype)
        with self._lock:
            if self._used + kept.nbytes <= self.memory:
                self._used += kept.nbytes
                return held(kept, dtype)
            try:
                start = self._append(kept)
            except OSError as error:
                raise storage_error(error, Path(tempfile.gettempdir())) from None
        # Delete the array: the lazy tensor must not keep it in memory.
        shape, count = tuple(kept.shape), kept.nbytes
        return Lazy(shape, dtype, lambda: self._read(start, count))

    def _append(self, kept: Array) -> int:
        if self._file is None:
            self._file = cast("BinaryIO", tempfile.TemporaryFile(prefix="adapterkit-"))  # noqa: SIM115 - closed below
            # Each lazy tensor refers to the spool, so the file is closed when the last tensor is deleted.
            weakref.finalize(self, self._file.close)
        start = self._end
        self._file.seek(start)
        self._file.write(kept.reshape(-1).view("u1").data)
        self._file.flush()
        self._end += kept.nbytes
        return start

    def _read(self, start: int, count: int) -> bytes:
        assert self._file is not None
        with self._lock:
            self._file.seek(start)
            found = self._file.read(count)
        if len(found) != count:
            raise storage_error(OSError(errno.EIO, os.strerror(errno.EIO)), Path(tempfile.gettempdir()))
        return found
