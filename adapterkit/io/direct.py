"""Write files with direct I/O in another thread, and copy bytes between files inside the kernel."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, cast

CHUNK = 32 << 20
# `copy_file_range` fails with one of these errors if the kernel or the file system cannot copy between the two files.
# In that case, the caller must read and write the bytes itself.
_NOT_HERE = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM}


def copy_by_kernel(
    source: BinaryIO, target: BinaryIO, start: int, at: int, nbytes: int, moved: Callable[[int], None]
) -> int:
    """Copy `nbytes` bytes between two open files inside the kernel. If possible, the files share the disk blocks.

    The bytes from offset `start` of the source go to offset `at` of the target.

    Returns:
        The number of bytes that the kernel copied. It may be less than `nbytes`; the caller must copy the rest.

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
    """A cache of open files, with a limited size, so that a base of hundreds of shards does not use up file handles."""

    def __init__(self, limit: int = 8, opener: Callable[[str, int], int] | None = None) -> None:
        self.limit, self.opener = limit, opener
        self._files: dict[tuple[str, str], BinaryIO] = {}

    def __call__(self, path: str, mode: str = "rb") -> BinaryIO:
        """Return the open, unbuffered file for a path. If too many are open, close the least recently used one."""
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
    """Make the kernel write each range of a file to disk soon, and then remove the range from the page cache.

    This has three advantages. The kernel writes to disk during the computation, not only at the final flush. The kernel
    reuses the removed pages, which is faster than mapping new memory. Files of other programs stay in the page cache.

    Args:
        lag: the number of recent ranges that stay in the page cache.
    """

    def __init__(self, lag: int = 3) -> None:
        self.lag = lag
        self._written: list[tuple[BinaryIO, int, int]] = []

    def __call__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        _let_go(file, start, nbytes)
        # Advise the kernel twice for each range. The first call makes the kernel start writing the range's dirty pages
        # to disk. The second call, `lag` ranges later, makes the kernel remove the pages, which are clean by then.
        self._written.append((file, start, nbytes))
        if len(self._written) > self.lag:
            _let_go(*self._written.pop(0))


def _let_go(file: BinaryIO, start: int, nbytes: int) -> None:
    """Advise the kernel to write the dirty pages of a range, and to remove its clean pages from the cache."""
    if not file.closed:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all bytes to an unbuffered file; one call of `write` may write only a part of the bytes."""
    while data:
        data = data[file.write(data) :]


def read_all(file: BinaryIO, data: memoryview) -> None:
    """Read from an unbuffered file until `data` is full.

    Raises:
        EOFError: the file ends before `data` is full.
    """
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        data = data[count:]


# Write files in another thread, while the caller computes. The writes bypass the page cache: the disk gets whole pages
# directly from this process's memory.
#
# With the page cache, the kernel would copy every byte into new pages and evict these pages later. The copies and
# evictions take half as much processor time as a merge's arithmetic. The kernel would also evict files that other
# programs still read.


PAGE = max(mmap.PAGESIZE, 4096)
"""The alignment of direct writes: offsets, lengths and addresses are multiples of this many bytes. No common disk needs
a larger alignment."""

PIECE = 4 << 20
"""The size of one write to the disk, in bytes."""

DEPTH = 2
"""The number of pieces that may wait for the disk while the next piece is filled."""

BUFFERED = (DEPTH + 1) * PIECE
"""The memory that a writer uses, in bytes; it does not depend on the size of the output."""

BUFFER = 512 << 10
"""Bytes are copied into a writer's memory in steps of this size.

A caller that needs a sha256 updates it after each step, while the step's bytes are still in the CPU cache.
"""

Moved = Callable[[int], None]


@dataclass(slots=True)
class _Piece:
    """A block of memory with bytes that will be written to a file.

    Only the bytes `memory[start:end]` will be written. `memory[0]` belongs to offset `at` of the file, a multiple of
    `PAGE`.
    """

    memory: memoryview
    path: str = ""
    at: int = 0
    start: int = 0
    end: int = 0


class Writer:
    """Write runs of bytes into existing files. The caller's thread fills memory; another thread writes it to disk."""

    def __init__(self) -> None:
        self.plain, self.direct, self.behind = OpenFiles(), OpenFiles(opener=self._past_the_cache), WriteBehind()
        self.cached = False
        self.pool = ThreadPoolExecutor(1)
        self.sent: deque[tuple[Future[None], memoryview]] = deque()
        self.idle: list[memoryview] = []
        self.filling = _Piece(_pages(PIECE))
        self.failure: OSError | None = None

    def begin(self, path: str, offset: int) -> None:
        """Start a run of bytes at offset `offset` of a file."""
        # The file offsets of direct writes must be multiples of `PAGE`. So `memory[0]` belongs to the largest multiple
        # of `PAGE` that is at most `offset`. The first `within` bytes of the memory belong to offsets before `offset`,
        # and are not written.
        within = offset % PAGE
        self.filling = _Piece(self.filling.memory, path, offset - within, within, within)

    def room(self, nbytes: int) -> memoryview:
        """Return memory for the next `nbytes` bytes. The caller fills the memory, then calls `filled`.

        Raises:
            OSError: an earlier piece could not be written.
        """
        if self.filling.end + nbytes > len(self.filling.memory):
            whole = self.filling.end // PAGE * PAGE
            if whole > self.filling.start:
                self._send(whole)
            self._grow(self.filling.end + nbytes)
        return self.filling.memory[self.filling.end : self.filling.end + nbytes]

    def filled(self, nbytes: int) -> None:
        """Add `nbytes` bytes to the run. The caller has put them at the start of the memory that `room` returned."""
        self.filling.end += nbytes

    def write(self, data: memoryview) -> None:
        """Add a copy of `data` to the run."""
        for start in range(0, len(data), BUFFER):
            piece = data[start : start + BUFFER]
            self.room(len(piece))[:] = piece
            self.filled(len(piece))

    def copy(self, source: BinaryIO, start: int, nbytes: int, moved: Moved = lambda _: None) -> None:
        """Add bytes of an open, unbuffered file to the run. If possible, the two files share disk blocks.

        The kernel copies the bytes only if the offsets in the source and in the target are equal modulo `PAGE`. For
        other offsets, the kernel would copy page by page, which is slower than reading and writing many pages at once.

        Args:
            source: the file to copy from.
            start: the offset in `source` of the first byte.
            nbytes: the number of bytes.
            moved: a function that is called after each step with the number of bytes that the step copied.

        Raises:
            EOFError: the source file ends before `nbytes` bytes were read.
            OSError: reading or writing failed.
        """
        at = self.filling.at + self.filling.end
        done = 0 if (start - at) % PAGE else self._copy_by_kernel(source, start, nbytes, moved)
        source.seek(start + done)
        while done < nbytes:
            room = self.room(min(nbytes - done, BUFFER))
            read_all(source, room)
            self.filled(len(room))
            done += len(room)
            moved(len(room))

    def finish(self) -> Future[None]:
        """End a run of bytes; call this before the next `begin`.

        Returns:
            A future that is done when the whole run is written; it raises OSError if a write failed.
        """
        return self._send(self.filling.end)

    def close(self) -> None:
        """Wait for pending writes, close the files, and free the memory."""
        self.pool.shutdown()
        self.plain.close()
        self.direct.close()
        # Release the memory now. `direct` refers back to this object. Because of this cycle, Python would free the
        # memory only when the garbage collector runs.
        self.sent.clear()
        self.idle.clear()
        self.filling = _Piece(memoryview(b""))

    def _copy_by_kernel(self, source: BinaryIO, start: int, nbytes: int, moved: Moved) -> int:
        """Let the kernel copy bytes, after all pending writes. Return the number of bytes that it copied."""
        path, at = self.filling.path, self.filling.at + self.filling.end
        if self.filling.end > self.filling.start:
            self.finish()

        def copy() -> int:
            target = self.plain(path, "r+b")
            done = copy_by_kernel(source, target, start, at, nbytes, moved)
            self.behind(target, at, done)
            return done

        done = self.pool.submit(copy).result()
        self.begin(path, at + done)
        return done

    def _send(self, stop: int) -> Future[None]:
        """Pass the bytes before `stop` to the writing thread; copy the rest, less than a page, to a new piece."""
        piece = self.filling
        future = self.pool.submit(self._write, piece, stop)
        self.sent.append((future, piece.memory))
        rest = piece.memory[stop : piece.end]
        self.filling = _Piece(self._memory(), piece.path, piece.at + stop, 0, len(rest))
        self.filling.memory[: len(rest)] = rest
        return future

    def _memory(self) -> memoryview:
        if not self.idle and len(self.sent) > DEPTH:
            self._settle()
        return self.idle.pop() if self.idle else _pages(PIECE)

    def _settle(self) -> None:
        """Wait for the oldest pending piece."""
        future, memory = self.sent.popleft()
        future.result()
        if len(memory) == PIECE:
            self.idle.append(memory)

    def _grow(self, nbytes: int) -> None:
        """Enlarge the current piece to `nbytes`. First wait for all pending pieces, to limit the memory."""
        if nbytes > len(self.filling.memory):
            while self.sent:
                self._settle()
            larger = _pages(nbytes)
            larger[: self.filling.end] = self.filling.memory[: self.filling.end]
            self.filling.memory = larger

    def _write(self, piece: _Piece, stop: int) -> None:
        """Write a piece. Write whole pages with direct I/O, and partial pages at its ends through the page cache."""
        # If an earlier piece failed, raise its error again. The caller waits only for the last piece of a run, so
        # otherwise it would not see the earlier error.
        if self.failure is not None:
            raise self.failure
        first = min(-(-piece.start // PAGE) * PAGE, stop)
        last = max(stop // PAGE * PAGE, first)
        try:
            self._put(self.plain, piece, piece.start, first)
            self._put_directly(piece, first, last)
            self._put(self.plain, piece, last, stop)
            if self.cached:
                self.behind(self.plain(piece.path, "r+b"), piece.at + piece.start, stop - piece.start)
        except OSError as error:
            self.failure = error
            raise

    def _put_directly(self, piece: _Piece, start: int, stop: int) -> None:
        try:
            self._put(self.direct, piece, start, stop)
        except OSError as error:
            # The system reports EINVAL if the file system needs a larger alignment, or if a write stopped early at an
            # offset that is not a multiple of `PAGE`. In both cases, write the whole range through the page cache.
            if error.errno != errno.EINVAL:
                raise
            self._put(self.plain, piece, start, stop)

    def _past_the_cache(self, path: str, flags: int) -> int:
        """Open a file with O_DIRECT if the operating system and the file system support it, otherwise normally."""
        try:
            return os.open(path, flags | os.O_DIRECT)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
        self.cached = True
        return os.open(path, flags)

    def _put(self, files: OpenFiles, piece: _Piece, start: int, stop: int) -> None:
        if start < stop:
            file = files(piece.path, "r+b")
            file.seek(piece.at + start)
            write_all(file, piece.memory[start:stop])


def _pages(nbytes: int) -> memoryview:
    """Return new memory that starts at a page boundary, as direct writes require. A bytearray may start anywhere."""
    length = -(-nbytes // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, length))
    # Ask for pages of 2 MB. For a direct write, the kernel pins and maps each page, and a request to the disk can have
    # only a limited number of page ranges. With pages of 4 kB, writes reach 2.6 GB/s and take 40 ms of processor time
    # per GB. With pages of 2 MB, they reach 3.6 GB/s and take 10 ms per GB. The mapping is private, because few systems
    # use large pages for shared mappings.
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # The kernel may have been built without large pages.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)
