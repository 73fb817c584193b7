"""Write files atomically: they appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import storage_error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file next to `path`. If the block succeeds, sync the file and rename it to `path`.

    After an error in the block, the temporary file is removed. Its name is computed from `path`, so the next writer
    reuses a file that a killed process left. Two writers of the same path wait for each other. The file's mode follows
    the umask, as for any new file.

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
                # Sync before the rename: after a crash, the new name must not point to missing data.
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
    """Return the path of the temporary file that `replacing` uses."""
    return path.with_name(f".{path.name}.part")


def _alone(part: Path) -> BinaryIO:
    """Open the temporary file and lock it; wait while another process or thread writes it."""
    while True:
        # Do not truncate before the lock is held: another process may still be writing the file.
        file = open(part, "w+b", opener=_untouched)  # noqa: SIM115 - the caller closes it
        try:
            lock(file.fileno(), wait=True)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        except FileNotFoundError:
            pass  # Open again: the previous holder of the lock has renamed or removed this file.
        except BaseException:
            file.close()
            raise
        file.close()


def _untouched(name: str, flags: int) -> int:
    """Open a file without truncating it. Refuse a link: another user could have created it in a shared folder."""
    return os.open(name, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically and durably."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames inside it survive a crash. On Windows, this is impossible: do nothing."""
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
    except (
        ImportError
    ):  # Windows has no flock. There, os.replace onto an open file fails, which protects the file as well.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
