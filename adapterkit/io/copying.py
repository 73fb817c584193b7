"""Copy byte ranges between files, in the kernel where possible."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO, cast

CHUNK = 32 << 20
# Errors by which the kernel or the file system declines a copy; the caller then reads and writes the bytes itself.
_NOT_HERE = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM}


def copy_by_kernel(
    source: BinaryIO, target: BinaryIO, start: int, at: int, nbytes: int, moved: Callable[[int], None]
) -> int:
    """Copy `nbytes` from offset `start` of one open file to offset `at` of another; share disk blocks if possible.

    Returns:
        How many bytes the kernel copied. It may be fewer than `nbytes`, and the caller copies the rest.

    Raises:
        OSError: reading or writing failed.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < nbytes:
        size = min(CHUNK, nbytes - done)
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), size, start + done, at + done)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return done
            raise
        if not count:
            return done
        done += count
        moved(count)
    return done


class OpenFiles:
    """A limited cache of open files: a base of hundreds of shards must not exhaust the process's file handles."""

    def __init__(self, limit: int = 8, opener: Callable[[str, int], int] | None = None) -> None:
        self.limit, self.opener = limit, opener
        self._files: dict[tuple[str, str], BinaryIO] = {}

    def __call__(self, path: str, mode: str = "rb") -> BinaryIO:
        """Return the file, unbuffered; at the limit, the least recently used file is closed."""
        file = self._files.pop((path, mode), None)
        if file is None:
            while len(self._files) >= self.limit:
                self._files.pop(next(iter(self._files))).close()
            file = cast(BinaryIO, open(path, mode, buffering=0, opener=self.opener))  # noqa: SIM115
        self._files[path, mode] = file
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class WriteBehind:
    """Start writing ranges to disk at once, and drop their pages from the page cache afterwards.

    The disk is busy from the first range on, instead of only at the final flush. The kernel also reuses the dropped
    pages, which is cheaper than fresh memory and leaves the cached files of other programs alone.

    Args:
        lag: how many of the last ranges keep their pages.
    """

    def __init__(self, lag: int = 3) -> None:
        self.lag = lag
        self._written: list[tuple[BinaryIO, int, int]] = []

    def __call__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        _let_go(file, start, nbytes)
        # The first advice starts the write-back of dirty pages; only the second one, later, finds clean pages to drop.
        self._written.append((file, start, nbytes))
        if len(self._written) > self.lag:
            _let_go(*self._written.pop(0))


def _let_go(file: BinaryIO, start: int, nbytes: int) -> None:
    """Advise the kernel: it starts writing dirty pages and drops clean ones."""
    if not file.closed:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write every byte to an unbuffered file, which may take fewer at a time."""
    while data:
        data = data[file.write(data) :]


def read_all(file: BinaryIO, data: memoryview) -> None:
    """Fill `data` from an unbuffered file.

    Raises:
        EOFError: the file ends early.
    """
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        data = data[count:]
