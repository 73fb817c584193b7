"""Writing past the page cache, beside the work: whole pages go from the maker's memory straight to the disk.

To copy every byte into fresh pages of the kernel, and to throw those out again, takes as much processor time as half of
a merge's arithmetic; and a model that is only written would push out of memory what other programs still read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from .copying import OpenFiles, WriteBehind, copy_by_kernel, read_all, write_all

PAGE = max(mmap.PAGESIZE, 4096)
"""Offsets, lengths and addresses of direct writes are multiples of it; no disk in use asks for more."""

PIECE = 4 << 20
"""Bytes that go to the disk at a time."""

DEPTH = 2
"""Pieces on their way to the disk while the next is filled."""

HELD = (DEPTH + 1) * PIECE
"""Bytes that a writer holds, whatever it writes."""

BUFFER = 512 << 10
"""Bytes that are copied at a time: they stay in a core's cache between reading and writing."""

Moved = Callable[[int], None]


@dataclass(slots=True)
class _Piece:
    """Memory whose bytes from `start` to `end` belong to a file, `memory[0]` at its byte `at`, where a page begins."""

    memory: memoryview
    path: str = ""
    at: int = 0
    start: int = 0
    end: int = 0


class Writer:
    """Writes runs of bytes into existing files: one thread fills memory, and one beside it writes."""

    def __init__(self) -> None:
        self.plain, self.direct, self.behind = OpenFiles(), OpenFiles(opener=self._past_the_cache), WriteBehind()
        self.cached = False
        self.pool = ThreadPoolExecutor(1)
        self.sent: deque[tuple[Future[None], memoryview]] = deque()
        self.idle: list[memoryview] = []
        self.filling = _Piece(_pages(PIECE))
        self.failure: OSError | None = None

    def begin(self, path: str, offset: int) -> None:
        """Turns to the bytes of a file from `offset` on."""
        within = offset % PAGE
        self.filling = _Piece(self.filling.memory, path, offset - within, within, within)

    def room(self, nbytes: int) -> memoryview:
        """Memory for the next bytes: the caller fills it and then calls `filled`.

        Raises:
            OSError: what was filled before could not be written.
        """
        if self.filling.end + nbytes > len(self.filling.memory):
            whole = self.filling.end // PAGE * PAGE
            if whole > self.filling.start:
                self._send(whole)
            self._grow(self.filling.end + nbytes)
        return self.filling.memory[self.filling.end : self.filling.end + nbytes]

    def filled(self, nbytes: int) -> None:
        """So many bytes of the room hold what is to be written."""
        self.filling.end += nbytes

    def write(self, data: memoryview) -> None:
        """Takes the next bytes from memory that lies elsewhere."""
        for start in range(0, len(data), BUFFER):
            piece = data[start : start + BUFFER]
            self.room(len(piece))[:] = piece
            self.filled(len(piece))

    def copy(self, source: BinaryIO, start: int, nbytes: int, moved: Moved = lambda _: None) -> None:
        """Takes the next bytes from an open, unbuffered file; shares blocks of the disk where the file system can.

        Between places that lie differently in their pages the kernel goes page by page, which takes longer than to read
        and write whole runs of pages.

        Args:
            source: the file.
            start: its first byte to take.
            nbytes: how many.
            moved: called with numbers of bytes when they are taken.

        Raises:
            EOFError: the source ends early.
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
        """Ends a run of bytes, before another is begun.

        Returns:
            done when all of the run is written, or has the OSError of why it is not.
        """
        return self._send(self.filling.end)

    def close(self) -> None:
        """Waits for what is on its way, and closes the files."""
        self.pool.shutdown()
        self.plain.close()
        self.direct.close()

    def _copy_by_kernel(self, source: BinaryIO, start: int, nbytes: int, moved: Moved) -> int:
        """How many bytes the kernel took; in the other thread, behind what that has still to write."""
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
        """Has the bytes up to `stop` written; those behind it, less than a page, come first in the next piece."""
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
        """Waits for the oldest piece on its way."""
        future, memory = self.sent.popleft()
        future.result()
        if len(memory) == PIECE:
            self.idle.append(memory)

    def _grow(self, nbytes: int) -> None:
        """Makes the piece as large as one block asks for; there is one such piece at a time."""
        if nbytes > len(self.filling.memory):
            while self.sent:
                self._settle()
            larger = _pages(nbytes)
            larger[: self.filling.end] = self.filling.memory[: self.filling.end]
            self.filling.memory = larger

    def _write(self, piece: _Piece, stop: int) -> None:
        """Writes a piece: whole pages directly, what is less than a page at either end by way of the cache."""
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
            if error.errno != errno.EINVAL:  # a file system that wants more than pages, or was cut off within one
                raise
            self._put(self.plain, piece, start, stop)

    def _past_the_cache(self, path: str, flags: int) -> int:
        """Opens for direct writing where the file system knows it; elsewhere as usual."""
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
    return memoryview(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE))
