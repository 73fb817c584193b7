"""The stage: a hidden folder beside the output where a merge is built and resumed, and from where it is renamed.

A finished file lies under `out/`, its norms and checksums under `norms/`; whatever else is there is unfinished and
written again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import AdapterkitError, StorageError, storage_error
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
        self._old = self.folder / "replaced"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the stage for this process; lays it out, or takes over what an interrupted merge left.

        Raises:
            StorageError: another process is merging to the same output, or the folder cannot be written.
        """
        made = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            with self._open_lock() as lock:
                self._hold(lock.fileno())
                self._lay_out_or_discard()
                yield
        except OSError as error:
            raise storage_error(error, error.filename or self.target) from error
        finally:
            _remove_empty(self.folder, *made)

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
        found: Norms = self._found(name)["norms"]
        return found

    def runs_of(self, name: str) -> list[tuple[int, int, str]]:
        """The checksums of the runs of a finished file: where each begins, its bytes, their sha256."""
        return [(start, nbytes, digest) for start, nbytes, digest in self._found(name)["runs"]]

    def _found(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._norms / f"{name}.json").read_text())
        return found

    def apart(self) -> Stage:
        """The same stage, with unfinished files in a folder of their own: for one of several processes."""
        stage = Stage(self.target, self.digest, self.files, single=self.single)
        stage.parts = self.parts / secrets.token_hex(8)
        stage.parts.mkdir()
        return stage

    def finish(self, name: str, norms: Mapping[str, Any], runs: Sequence[tuple[int, int, str]] = ()) -> None:
        """Makes a file of `parts/` durable and moves it to `out/`."""
        part = self.parts / name
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        write_bytes(self._norms / f"{name}.json", json.dumps({"norms": norms, "runs": runs}).encode())
        os.replace(part, self.out / name)

    def link(self, name: str, file: Path) -> bool:
        """Finishes a file as a hard link to one of the base; False where the file system has none between the two."""
        try:
            os.link(file.resolve(), self.parts / name)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                return False
            raise
        self.finish(name, {})
        return True

    def publish(self) -> None:
        """Makes the whole output durable, renames it into place and removes the stage.

        Raises:
            OSError: it cannot be; what was there before is there again.
        """
        for folder, _, _ in os.walk(self.out):
            sync_folder(Path(folder))
        write_bytes(self._marker, b"")
        single = next(self.out.iterdir()) if self.single else self.out
        shutil.rmtree(self._old, ignore_errors=True)
        if self.target.exists():
            os.replace(self.target, self._old)
        try:
            os.replace(single, self.target)
            sync_folder(self.target.parent)
        except OSError:
            self._take_back()
            raise
        self.discard()

    def discard(self) -> None:
        """Removes the stage and all that is in it, but never what was at the output before and is there no more."""
        if self._put_back():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take_back(self) -> None:
        with contextlib.suppress(OSError):
            if self.target.exists():
                os.replace(self.target, self.folder / "undone")

    def _put_back(self) -> bool:
        """Whether the output is what it was, or what it became; a run that ended between two renames left neither."""
        if self._old.exists() and not self.target.exists():
            with contextlib.suppress(OSError):
                os.replace(self._old, self.target)
        return self.target.exists() or not self._old.exists()

    def _open_lock(self) -> BinaryIO:
        try:
            return open(self.folder / "lock", "wb")
        except FileNotFoundError:  # another merge has just ended and removed its stage
            raise _taken(self.target) from None

    def _hold(self, handle: int) -> None:
        _lock(handle, self.target)
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(self.folder / "lock"))
        except FileNotFoundError:
            same = False
        if not same:  # whoever held it has ended since it was opened here, and removed it
            raise _taken(self.target)

    def _lay_out_or_discard(self) -> None:
        try:
            self._lay_out()
        except (AdapterkitError, OSError):
            self.discard()
            raise

    def _lay_out(self) -> None:
        if not self._put_back():
            why = f"what was here before lies in {self._old} and cannot be moved back"
            raise StorageError(why, path=self.target, cure="Move it back, then run the same command again")
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
        raise _taken(out) from None


def _taken(out: Path) -> StorageError:
    return StorageError("another merge is writing here", path=out, cure="Wait for it, or write elsewhere")


def _remove_empty(*folders: Path) -> None:
    """Removes folders made for a stage that came to nothing, innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
