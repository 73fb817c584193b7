"""A disk that fails, or takes the process with it, at the n-th thing that is asked of it.

Every call that changes what lies below one folder is a point: opening to write, writing, reserving, copying by the
kernel, fsync, rename, making and removing. The calls are met where Python hands them to the system, whoever makes them.
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
"""What a full disk refuses; a rename or an fsync needs no more space."""

CLEANS = {"unlink", "rmdir"}


class Disk:
    """Counts the points below `folder` and does something at one of them, or from one on.

    Args:
        folder: what is watched.
        at: the point, counted from 0; None only counts.
        act: what is done there, given the name of the call and what it would write.
        until_end: act at every later point too.
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
        """The calls of this process go by the disk for as long as this lasts."""
        opening = _opening(self, builtins.open)
        with patch("builtins.open", opening), patch("io.open", opening), patch.multiple(os, **_calls(self)):
            yield self


def failing(number: int) -> Callable[[str, Any], None]:
    """What a disk does that answers with this errno."""

    def act(_call: str, _write: Any) -> None:
        raise OSError(number, os.strerror(number))

    return act


def killing(_call: str, write: Callable[[], None] | None) -> None:
    """kill -9; of what would be written, half has been."""
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
    """The functions of `os` that change a disk; which argument says where."""
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
