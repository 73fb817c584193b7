"""Local folders for hub files: the cache, scratch folders, and locks on folders that a command writes to."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import StorageError, storage_error


def cache_folder() -> Path:
    """Return the cache folder: `$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder."""
    root = os.environ.get("ADAPTERKIT_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adapterkit")
    return Path(root)


@contextmanager
def locked(stage: Path) -> Iterator[None]:
    """Create a folder if it is missing, and hold the folder's lock until the block ends.

    Raises:
        StorageError: another process holds the lock.
    """
    stage.mkdir(exist_ok=True)
    with open(stage / "lock", "wb") as lock:
        if not _held(lock):
            raise StorageError("another process is writing here", path=stage, cure="Wait for it")
        yield


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder during the block; wait while another process on this machine holds the lock.

    The folder need not exist.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.turn"), "wb") as lock:
        _held(lock, wait=True)
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder in the cache and remove it afterwards.

    Folders left by killed processes are removed first.

    Raises:
        StorageError: the cache folder is not writable.
    """
    root, name = cache_folder() / "scratch", secrets.token_hex(8)
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Hold the lock of the parent folder until the new lock file is locked. Otherwise another process could
            # remove the new file first, because no process holds its lock yet.
            with open(root / "lock", "wb") as gate:
                _held(gate, wait=True)
                _sweep(root)
                lock = stack.enter_context(open(root / f"{name}.lock", "wb"))
                _held(lock)
            (root / name).mkdir()
        except OSError as error:
            raise storage_error(error, error.filename or root) from error
        stack.callback(_forget, root / f"{name}.lock")
        yield root / name


def _sweep(root: Path) -> None:
    """Remove the folders of dead processes: no process holds their locks. On systems without `flock`, do nothing."""
    if not _has_locks():
        return
    for file in root.glob("*.lock"):
        with open(file, "r+b") as lock:
            if _held(lock):
                _forget(file)


def _forget(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def _has_locks() -> bool:
    return os.name == "posix"


def _held(file: BinaryIO, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed; return False if another process holds the lock."""
    if not _has_locks():
        # Return True on Windows, which has no flock. There, renaming a folder with open files fails, which protects the
        # folder.
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
