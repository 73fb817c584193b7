"""Write files atomically: a file appears complete or not at all.

This module also remembers the tensors from which a file was written, until the file has been checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import storage_error

if TYPE_CHECKING:
    from .lazy import DType, Lazy


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file next to `path`. If the block succeeds, sync the file and rename it to `path`.

    If the block raises an error, the temporary file is removed. A killed process leaves its temporary file behind. The
    next writer of `path` reuses this file, because the temporary file's name depends only on `path`. If two writers
    have the same path, the second waits until the first is done. The file's mode follows the umask, as for any new
    file.

    Raises:
        StorageError: the folder is not writable, or the disk is full.
    """
    part = part_of(path)
    try:
        with _alone(part) as file:
            try:
                # Empty the file: a killed writer may have left data in it.
                file.truncate(0)
                yield file
                # Sync before the rename. Otherwise, after a crash, `path` could be a file without its data.
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # Windows cannot rename an open file.
                    file.close()
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


def part_of(path: Path) -> Path:
    """Return the path of the temporary file that `replacing` uses for `path`."""
    return path.with_name(f".{path.name}.part")


def _alone(part: Path) -> BinaryIO:
    """Open the temporary file and lock it. If another process or thread is writing the file, wait."""
    while True:
        # Do not truncate the file before it is locked: another process may still be writing the file.
        file = open(part, "w+b", opener=_untouched)  # noqa: SIM115 - the caller closes it
        try:
            lock(file.fileno(), wait=True)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        except FileNotFoundError:
            pass  # The previous holder of the lock has renamed or removed the file, so open the path again.
        except BaseException:
            file.close()
            raise
        file.close()


def _untouched(name: str, flags: int) -> int:
    """Open a file without truncating it. Refuse a symbolic link, which another user may have put in a shared folder."""
    return os.open(name, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically and durably."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a crash. Windows cannot sync folders: do nothing there."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed. If another process holds the lock, wait (`wait=True`) or return False."""
    try:
        import fcntl
    except ImportError:
        # Windows has no flock. But Windows refuses to replace an open file, which protects the file as well.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


# Remember the source tensors of a written file while the writer checks the file.
#
# After writing a file, a writer reads the file back to check it. The header and the last bytes of a few tensors are
# read from the disk. All other reads of a remembered tensor return its source tensor, because reading a tensor from the
# disk takes 70 us if the file was written with direct I/O, which bypasses the page cache.


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """The source tensors of a written file, and a function that reads the file.

    Attributes:
        sources: the source tensors, keyed by the name that each tensor has in the file.
        read: a function that takes the file's path and returns the file's tensors as lazy tensors.
    """

    sources: Mapping[str, Lazy]
    read: Callable[[str], Mapping[str, Lazy]]

    def on_disk(self, path: str) -> Mapping[str, Lazy]:
        """Return the file's tensors as lazy tensors that read from the disk, not from the source tensors."""
        token = _WRITTEN.set(None)
        try:
            return self.read(path)
        finally:
            _WRITTEN.reset(token)


_WRITTEN: ContextVar[dict[str, Written] | None] = ContextVar("_WRITTEN", default=None)


@contextmanager
def sources_remembered() -> Iterator[dict[str, Written]]:
    """Remember the source tensors of files that are written in the block. Reading such a file returns these tensors.

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
    """Remember a written file's source tensors until the block of `sources_remembered` ends.

    Outside such a block, do nothing.
    """
    files = _WRITTEN.get()
    if files is not None:
        files[os.fspath(path)] = Written(sources, read)


def sources_of(path: str) -> Mapping[str, Lazy]:
    """Return the source tensors of a written file, keyed by name; empty if they are not remembered."""
    written = (_WRITTEN.get() or {}).get(path)
    return {} if written is None else written.sources


def source_of(path: str, name: str, dtype: DType, nbytes: int) -> Lazy | None:
    """Return the source tensor that was written to a file under the name `name`.

    The arguments `dtype` and `nbytes` come from the file's header. Return None if the source tensor has another dtype
    or size, or if no source tensor is remembered.
    """
    source = sources_of(path).get(name)
    return source if source is not None and (source.dtype, source.nbytes) == (dtype, nbytes) else None
