"""Where what comes from hubs, or is on its way to one, lies in the meantime."""

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
    """`$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder."""
    root = os.environ.get("ADAPTERKIT_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adapterkit")
    return Path(root)


@contextmanager
def locked(stage: Path) -> Iterator[None]:
    """Holds a folder for this process, which is made where it is not there.

    Raises:
        StorageError: another process has it.
    """
    stage.mkdir(exist_ok=True)
    with open(stage / "lock", "wb") as lock:
        if not _held(lock):
            raise StorageError("another process is writing here", path=stage, cure="Wait for it")
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder in the cache that is gone afterwards; those of processes that were killed go before it is made.

    Raises:
        StorageError: the cache cannot be written.
    """
    root, name = cache_folder() / "scratch", secrets.token_hex(8)
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Nobody sweeps between the making of a lock and its being held.
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
    """Removes what is left of processes that are gone: nobody holds its lock. Without locks all stays."""
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
    """Locks an open file for this process, until it is closed; False where another process has it."""
    if not _has_locks():
        # Windows: renaming a folder with open files fails there, which serves the same end.
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
