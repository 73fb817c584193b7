"""Copying runs of bytes between files, by the kernel where it can."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO, cast

CHUNK = 32 << 20
_NOT_HERE = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM}


def copy_by_kernel(
    source: BinaryIO, target: BinaryIO, start: int, at: int, nbytes: int, moved: Callable[[int], None]
) -> int:
    """Copies `nbytes` from `start` of one open file to `at` of another; shares blocks where the file system can.

    Returns:
        how many bytes the kernel copied: all, or as many as it would before it declined.

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
    """Files that are kept open, so many at once: a base of hundreds of shards must not run into the system's limit."""

    def __init__(self, limit: int = 8, opener: Callable[[str, int], int] | None = None) -> None:
        self.limit, self.opener = limit, opener
        self._files: dict[tuple[str, str], BinaryIO] = {}

    def __call__(self, path: str, mode: str = "rb") -> BinaryIO:
        """The file, unbuffered; the one that was not asked for the longest is closed for it."""
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
    """Has written ranges go to disk at once, and their pages go once they are there.

    So the disk works from the first range on instead of at the final flush, and new pages are those of old ranges,
    which is cheaper than fresh memory and leaves the caches of other programs alone.

    Args:
        lag: how many ranges keep their pages.
    """

    def __init__(self, lag: int = 3) -> None:
        self.lag = lag
        self._written: list[tuple[BinaryIO, int, int]] = []

    def __call__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        _let_go(file, start, nbytes)
        self._written.append((file, start, nbytes))
        if len(self._written) > self.lag:
            _let_go(*self._written.pop(0))


def _let_go(file: BinaryIO, start: int, nbytes: int) -> None:
    """Advice that starts the writing of dirty pages and lets clean ones go."""
    if not file.closed:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Writes every byte to an unbuffered file."""
    while data:
        data = data[file.write(data) :]


def read_all(file: BinaryIO, data: memoryview) -> None:
    """Fills `data` from an unbuffered file.

    Raises:
        EOFError: the file ends early.
    """
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        data = data[count:]
