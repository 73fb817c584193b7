"""Simulate a disk that fails, or kills the process, at the n-th operation.

Every call that changes something below one folder is a point: opening for writing, writing, reserving, copying by the
kernel, fsync, rename, creating and removing. Calls are intercepted in `os`, so it does not matter which library makes
them.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

FILLS = {"open", "write", "truncate", "posix_fallocate", "copy_file_range", "sendfile", "mkdir"}
"""Calls that a full disk refuses; a rename or an fsync does not need more space."""

CLEANS = {"unlink", "rmdir"}


class Disk:
    """Counts the points below `folder`, and acts at one of them, or at all from one on.

    Args:
        folder: the watched folder.
        at: the number of the point, from 0; None to only count.
        act: the action at the point; takes the name of the call and the data that it would write.
        until_end: True to act at every later point, too.
        only: the names of the calls that are points.
    """

    def __init__(
        self, folder: Path, at: int | None = None, act: Callable[[str, Any], None] | None = None,
        *, until_end: bool = False, only: set[str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.at, self.act = os.path.realpath(folder), at, act
        self.until_end, self.only = until_end, only
        self.points: list[str] = []
        self.lock = threading.Lock()

    def meet(self, call: str, place: Any, write: Callable[[], None] | None = None) -> None:
        if not self._below(place) or (self.only is not None and call not in self.only):
            return
        with self.lock:
            number = len(self.points)
            self.points.append(call)
        if self.act is not None and self._acts_at(number):
            self.act(call, write)

    def _acts_at(self, number: int) -> bool:
        return self.at is not None and (number == self.at or (self.until_end and number > self.at))

    def _below(self, place: Any) -> bool:
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.path.abspath(os.fspath(place))
        return os.path.join(os.path.realpath(os.path.dirname(path)), "").startswith(os.path.join(self.folder, ""))

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Send the calls of this process to the simulated disk during the block."""
        opening = _opening(self, builtins.open)
        with patch("builtins.open", opening), patch("io.open", opening), patch.multiple(os, **_calls(self)):
            yield self


def failing(number: int) -> Callable[[str, Any], None]:
    """Return an action that fails with this errno."""

    def act(_call: str, _write: Any) -> None:
        raise OSError(number, os.strerror(number))

    return act


def killing(_call: str, write: Callable[[], None] | None) -> None:
    """Kill the process with SIGKILL after half of the data is written."""
    if write is not None:
        write()
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(folder: Path, at: int) -> Disk:
    return Disk(folder, at, failing(errno.ENOSPC), until_end=True, only=FILLS)


def broken_disk(folder: Path, at: int) -> Disk:
    return Disk(folder, at, failing(errno.EIO), only=(FILLS | {"fsync", "replace", "rename", "link"}))


def _opening(disk: Disk, real: Callable[..., Any]) -> Callable[..., Any]:
    def opening(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+") or "b" not in mode:
            return real(file, mode, buffering, *rest, **options)
        disk.meet("open", file)
        raw = _File(file, mode.replace("b", ""), disk, options.get("opener"))
        if buffering == 0:
            return raw
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    return opening


class _File(io.FileIO):
    def __init__(self, file: Any, mode: str, disk: Disk, opener: Any) -> None:
        super().__init__(file, mode, opener=opener)
        self.disk = disk

    def write(self, data: Any) -> int:
        half = memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2]
        self.disk.meet("write", self.fileno(), lambda: super(_File, self).write(half))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.meet("truncate", self.fileno())
        return super().truncate(size)


def _calls(disk: Disk) -> dict[str, Any]:
    """Functions of `os` that change a disk -> the position of the argument with the path or file."""
    places = {
        "fsync": 0, "replace": 1, "rename": 1, "link": 1, "mkdir": 0, "posix_fallocate": 0, "copy_file_range": 1,
        "sendfile": 0, "unlink": 0, "rmdir": 0,
    }  # fmt: skip
    return {name: _met(disk, name, getattr(os, name), place) for name, place in places.items() if hasattr(os, name)}


def _met(disk: Disk, name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        where = options.get("dir_fd")
        disk.meet(name, args[place] if where is None else os.path.join(os.readlink(f"/proc/self/fd/{where}"), args[0]))
        return real(*args, **options)

    return call
