"""Manage the stage of a merge: a hidden folder in which the merge writes its files, so that it can be resumed.

Finished files are in `out/`, and their norms and checksums in `norms/`. A resumed merge writes all other files again.
`io/staging.py` moves the complete output to its path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from ..errors import AdapterkitError
from ..io.atomic import sync_folder, write_bytes
from ..io.staging import Move, Staging, clear, files_below, record_of

Norms = dict[str, list[float]]


class _Finished(TypedDict):
    """The record of a finished file: its norms, and (offset, number of bytes, sha256) of each run of bytes."""

    norms: Norms
    runs: list[tuple[int, int, str]]


SUFFIX = "merging"


class StagingDir(Staging):
    """The stage of one merge: the folder in which the merge builds its output.

    Args:
        out: the path of the output.
        digest: the digest of the plan. If the stage was left behind by a merge with another plan, it is cleared.
        files: the names of the plan's weight files; files that an earlier run finished are kept.
        single: whether the output is a single file instead of a folder.
    """

    def __init__(self, out: Path, digest: str, files: Collection[str], *, single: bool = False) -> None:
        super().__init__(out, SUFFIX, "merge")
        self.files, self.single, self.digest = files, single, digest
        self.parts = self.folder / "parts"
        self._norms = self.folder / "norms"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the stage for this process; create it, or continue the stage of an interrupted merge.

        Raises:
            StorageError: another process is merging to the same output, or the folder is not writable.
        """
        with super().locked():
            try:
                self._lay_out()
            except (AdapterkitError, OSError):
                self.discard()
                raise
            yield

    @property
    def was_completed(self) -> bool:
        """Whether an earlier run of this plan moved the complete output to its path, but did not delete the stage."""
        return self.is_published and self._plan() == self.digest

    def finished(self, name: str) -> bool:
        """Whether an earlier run finished this file."""
        return (self.out / name).exists()

    def norms_of(self, name: str) -> Norms:
        """Return the recorded norms of a finished file: a map from tensor names to lists of norms."""
        return self._read_finished(name)["norms"]

    def runs_of(self, name: str) -> list[tuple[int, int, str]]:
        """Return the checksums of a finished file: (offset, number of bytes, sha256) of each run of bytes."""
        return [(start, nbytes, digest) for start, nbytes, digest in self._read_finished(name)["runs"]]

    def _read_finished(self, name: str) -> _Finished:
        finished: _Finished = json.loads((self._norms / f"{name}.json").read_text())
        return finished

    def apart(self) -> StagingDir:
        """Return a `StagingDir` of the same stage for another process, with a separate folder for unfinished files."""
        stage = StagingDir(self.target, self.digest, self.files, single=self.single)
        stage.parts = self.parts / secrets.token_hex(8)
        stage.parts.mkdir()
        return stage

    def finish(
        self, name: str, norms: Mapping[str, Sequence[float]], runs: Sequence[tuple[int, int, str]] = ()
    ) -> None:
        """Finish a file: flush it to disk, record its norms and the checksums of its runs, and move it to `out/`."""
        part = self.parts / name
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        write_bytes(self._norms / f"{name}.json", json.dumps({"norms": norms, "runs": runs}).encode())
        os.replace(part, self.out / name)

    def finish_sketch(
        self, name: str, header: bytes, size: int, norms: Mapping[str, Sequence[float]],
        runs: Sequence[tuple[int, int, str]],
    ) -> None:  # fmt: skip
        """Finish a file whose bytes are on a hub: write a sparse file of the same size that has only the header."""
        with open(self.parts / name, "wb") as file:
            file.write(header)
            file.truncate(size)
        self.finish(name, norms, runs)

    def drop(self, name: str) -> None:
        """Remove a finished file, so that the next run writes it again."""
        (self.out / name).unlink(missing_ok=True)

    def link(self, name: str, file: Path) -> bool:
        """Finish a file as a hard link to the base's file `file`; return False if the file system does not allow it."""
        try:
            # If `file` is a symbolic link, link to the file to which it points. Hubs' caches consist of symbolic links,
            # and the output must not break when a cache is deleted.
            os.link(file.resolve(), self.parts / name)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                return False
            raise
        self.finish(name, {})
        return True

    def publish_all(self, made_from: str | None = None) -> None:
        """Flush the whole output to disk, move it to its path, and remove the stage.

        Args:
            made_from: a digest of everything on which the output depends. It is stored with the output, so that a later
                run recognizes the output as complete. If None, no digest is stored.

        Raises:
            OSError: the output cannot be renamed; the previous output is restored.
        """
        for folder, _, _ in os.walk(self.out):
            sync_folder(Path(folder))
        single = next(self.out.iterdir()) if self.single else self.out
        moves: list[Move] = [(single, self.target)]
        gone: list[Path] = []
        if self.inside:
            moves = [(entry, self.target / entry.name) for entry in sorted(self.out.iterdir())]
            gone = [entry for entry in self.target.iterdir() if entry != self.folder]
        files = {str(moves[-1][1].relative_to(self.place)): single} if self.single else self._files()
        record = None if made_from is None else record_of(made_from, files)
        # Pass durable=True to skip a second fsync, because every file was flushed when it was written.
        self.publish(moves, gone, durable=True, record=record)
        self.discard()

    def discard(self, keep: Collection[str] = ()) -> None:
        """Remove the stage.

        The file `plan` is removed last. So if the process is killed during the removal, the next run still recognises
        the completed merge.
        """
        super().discard({"plan", *keep})

    def _files(self) -> dict[str, Path]:
        """Return a map from each file's name in the output's record to its path in the stage."""
        folder = Path() if self.inside else Path(self.target.name)
        return {str(folder / file.relative_to(self.out)): file for file in files_below(self.out)}

    def _lay_out(self) -> None:
        resumable = self._plan() == self.digest and self.out.exists()
        if not resumable and not self.was_completed:
            clear(self.folder, keep={"lock"})
            for folder in (self.out, self.parts, self._norms):
                folder.mkdir()
            write_bytes(self.folder / "plan", self.digest.encode())
        elif self.out.exists():
            clear(self.out, keep=self.files)

    def _plan(self) -> str | None:
        with contextlib.suppress(OSError):
            return (self.folder / "plan").read_text()
        return None
