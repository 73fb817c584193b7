"""Write files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import storage_error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`. On success, sync it and rename it to `path`; on any error, remove it.

    The temporary file's name is derived from `path`, so the next writer reuses the file that a killed process left.
    Two writers of one path take turns. The file's mode follows the umask, like that of any new file.

    Raises:
        StorageError: the folder cannot be written, or there is no space.
    """
    part = part_of(path)
    try:
        with _alone(part) as file:
            try:
                # The file may hold what a killed writer left.
                file.truncate(0)
                yield file
                # Sync before the rename: after a crash, the new name must not be without its data.
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
    """Return the path of the temporary file of `replacing`."""
    return path.with_name(f".{path.name}.part")


def _alone(part: Path) -> BinaryIO:
    """Open a file that no other process or thread is writing; wait if another one is."""
    while True:
        # Do not truncate before the lock is held: another process may still be writing the file.
        file = open(part, "w+b", opener=_untouched)  # noqa: SIM115 - the caller closes it
        try:
            lock(file.fileno(), wait=True)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        except FileNotFoundError:
            pass  # The previous holder of the lock renamed or removed the file after it was opened here.
        except BaseException:
            file.close()
            raise
        file.close()


def _untouched(name: str, flags: int) -> int:
    """Open a file without truncating it; refuse a link, which another user could place in a shared folder."""
    return os.open(name, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically and durably."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows has no way to do that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed; return False if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; os.replace onto an open file fails there, which protects it as well.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
