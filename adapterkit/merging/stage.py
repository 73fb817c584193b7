"""The stage: a hidden folder beside the output where a merge is built and resumed, and from where it is renamed.

A finished file lies under `out/`, its norms under `norms/`; whatever else is there is unfinished and written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError, storage_error
from ..tensors.atomic import sync_folder, write_bytes

Norms = dict[str, list[float]]


class Stage:
    """The stage of one output path.

    Args:
        out: where the output will appear.
        digest: of the plan; a stage of another plan is thrown away.
        files: names of the files that are kept when an earlier run finished them; all else is written again.
        single: the output is the one file in the stage, not the folder.
    """

    def __init__(self, out: Path, digest: str, files: Collection[str], *, single: bool = False) -> None:
        self.target, self.files, self.single = out, files, single
        self.digest = digest
        self.folder = out.parent / f".{out.name}.merging"
        self.out = self.folder / "out"
        self.parts = self.folder / "parts"
        self._norms = self.folder / "norms"
        self._marker = self.folder / "publishing"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the stage for this process; lays it out, or takes over what an interrupted merge left.

        Raises:
            StorageError: another process is merging to the same output, or the folder cannot be written.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            with open(self.folder / "lock", "wb") as lock:
                _lock(lock.fileno(), self.target)
                self._lay_out()
                yield
        except OSError as error:
            raise storage_error(error, error.filename or self.target) from error

    @property
    def was_completed(self) -> bool:
        """The output is in place and only the stage was left behind."""
        published = self._marker.exists() and not (self.out.exists() and any(self.out.iterdir()))
        return published and self.target.exists() and self._journal() == self.digest

    def finished(self, name: str) -> bool:
        """Whether an earlier run finished this file."""
        return (self.out / name).exists()

    def norms_of(self, name: str) -> Norms:
        """The norms that were found while a finished file was computed."""
        found: Norms = json.loads((self._norms / f"{name}.json").read_text())
        return found

    def finish(self, name: str, norms: Mapping[str, Any]) -> None:
        """Makes a file of `parts/` durable and moves it to `out/`."""
        part = self.parts / name
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        write_bytes(self._norms / f"{name}.json", json.dumps(norms).encode())
        os.replace(part, self.out / name)

    def publish(self) -> None:
        """Makes the whole output durable, renames it into place and removes the stage."""
        for folder, _, _ in os.walk(self.out):
            sync_folder(Path(folder))
        write_bytes(self._marker, b"")
        if self.target.exists():
            self._move_aside()
        single = next(self.out.iterdir()) if self.single else self.out
        os.replace(single, self.target)
        sync_folder(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the stage and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _move_aside(self) -> None:
        if self.target.is_dir() and not any(self.target.iterdir()):
            self.target.rmdir()
            return
        old = self.folder / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.target, old)

    def _lay_out(self) -> None:
        if self._journal() != self.digest and not self.was_completed:
            _clear(self.folder, keep={"lock"})
            for folder in (self.out, self.parts, self._norms):
                folder.mkdir()
            write_bytes(self.folder / "plan", self.digest.encode())
        elif self.out.exists():
            _clear(self.out, keep=self.files)

    def _journal(self) -> str | None:
        with contextlib.suppress(OSError):
            return (self.folder / "plan").read_text()
        return None


def _clear(folder: Path, keep: Collection[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _lock(handle: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: os.replace onto an open file fails there, which serves the same end
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError("another merge is writing here", path=out, cure="Wait for it, or write elsewhere") from None
