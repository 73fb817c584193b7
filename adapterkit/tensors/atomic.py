"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import storage_error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success it is made durable and renamed over it, on any error removed.

    The temporary file's name is derived from `path`, so that what a killed process left is taken over by the next
    writer and does not stay for ever. Two writers of one path take turns. The mode is that of any new file, by the
    umask.

    Raises:
        StorageError: the folder cannot be written, or there is no space.
    """
    part = part_of(path)
    try:
        with _alone(part) as file:
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # Windows renames no open file.
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
    """The temporary file of `replacing`."""
    return path.with_name(f".{path.name}.part")


def _alone(part: Path) -> BinaryIO:
    """Open a file that no other process or thread is writing; waits for one that is."""
    while True:
        # It must not be cut off before it is locked: another process may still be writing it.
        file = open(part, "w+b", opener=_untouched)  # noqa: SIM115 - the caller closes it
        try:
            lock(file.fileno(), wait=True)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        except FileNotFoundError:
            pass  # The process that held the lock has renamed or removed the file since it was opened here.
        except BaseException:
            file.close()
            raise
        file.close()


def _untouched(name: str, flags: int) -> int:
    """Open a file as it is; a link, which another user could have laid where everybody may write, is an error."""
    return os.open(name, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, atomically and durably."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: os.replace onto an open file fails there, which serves the same end.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
