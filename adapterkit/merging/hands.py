"""What one worker does with a job: reads, computes, and has written what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from ..errors import AdapterkitError, Corrupt, ShapeMismatch, storage_error
from ..io.direct import OpenFiles, Writer, read_all
from .arrays import Arrays, Workspace
from .blocks import Block
from .checksums import Run, digest_of
from .compute import Folder
from .jobs import Job
from .lanes import Lane, lane_for
from .planned import Output


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a job.

    Attributes:
        norms: squared, of the changes, by fold.
        runs: checksums of what is written, where they are taken.
        written: done when the bytes of the job are in the file, or has the OSError of why they are not.
    """

    norms: dict[int, float]
    runs: list[Run]
    written: Future[None]


class Hands:
    """What one worker holds: open files, a lane for blocks, memory for what is to be written."""

    def __init__(self, arrays: Arrays, moved: Callable[[int], None]) -> None:
        self.arrays, self.moved, self.workspace = arrays, moved, Workspace(arrays)
        self.open, self.writer = OpenFiles(), Writer()
        self._lane: Lane | None = None

    def do(self, job: Job) -> Made:
        """Does one job; what it made may still be on its way to the disk.

        Raises:
            Corrupt: a file has become shorter.
            StorageError: a file cannot be read or written.
            Malformed: see `Folder`.
            ShapeMismatch: a formula cannot be computed with the tensors of its update.
        """
        self.writer.begin(str(job.file.path), job.offset)
        try:
            norms, runs = self._made(job)
            return Made(norms, runs, self.writer.finish())
        except EOFError:
            raise Corrupt("the file ends before its last tensor", path=job.source[0], cure=_CHANGED) from None
        except OSError as error:
            raise storage_error(error, error.filename or job.file.path) from error
        except AdapterkitError as error:
            raise error.at(where=job.output.name if job.output else None) from error.__cause__
        except (ValueError, IndexError, ZeroDivisionError) as error:
            if job.output is None or not job.output.folds:
                raise
            # numpy raises these where a formula meets sizes that validation cannot rule out, such as a rank of 0.
            updates = [update for fold in job.output.folds for update in fold.updates]
            methods = " and ".join(dict.fromkeys(update.method for update in updates))
            why = f"the formula of {methods} cannot be computed for this weight ({error})"
            path = next((update.file for update in updates if update.file is not None), None)
            cure = "The file is damaged, or the adapter is not of this base"
            raise ShapeMismatch(why, path=path, where=job.output.name, cure=cure) from error

    def close(self) -> None:
        """Waits for what is on its way, and closes the files."""
        self.writer.close()
        self.open.close()

    def _made(self, job: Job) -> tuple[dict[int, float], list[Run]]:
        if job.output is None:
            return {}, self._copy(job)
        return self._pack(job.output, job) if job.parts else self._compute(job.output, job)

    def _copy(self, job: Job) -> list[Run]:
        """The kernel copies without a look; what it copied is in memory now, and read again for its checksum."""
        path, start = job.source
        source = self.open(path)
        self.writer.copy(source, start, job.nbytes, self.moved)
        return [(job.offset, job.nbytes, digest_of(source, start, job.nbytes))] if job.file.summed else []

    def _compute(self, output: Output, job: Job) -> tuple[dict[int, float], list[Run]]:
        self._lane = lane = self._lane or lane_for(self.arrays)
        with lane.computing():
            folder = Folder(output, self.workspace)
            norms = folder.norms() if job.order == 0 else {}

        def compute(block: Block, raw: Any, out: Any) -> None:
            for fold, square in folder.compute(raw, out, block).items():
                norms[fold] = norms.get(fold, 0.0) + square

        written = _Summed(self.writer, self.moved, job.file.summed)
        lane.through(job.blocks, output.source.dtype, output.dtype, partial(self._read, output), compute, written)
        return norms, written.runs(job.offset, job.nbytes)

    def _pack(self, output: Output, job: Job) -> tuple[dict[int, float], list[Run]]:
        assert output.part is not None
        made, norms = output.part.compute(self.workspace)
        runs: list[Run] = []
        for part in job.parts:
            data = memoryview(made[part.name])
            self.writer.finish()
            self.writer.begin(str(job.file.path), part.offset)
            self.writer.write(data)
            self.moved(part.nbytes)
            runs += [(part.offset, part.nbytes, sha256(data).hexdigest())] if job.file.summed else []
        return norms if output.folds else {}, runs

    def _read(self, output: Output, block: Block, data: memoryview) -> None:
        span = output.source.span
        if span is None:
            data[:] = output.source.read(block.first, block.elements)
        else:
            file = self.open(span.path)
            file.seek(span.offset + block.first * output.source.dtype.itemsize)
            read_all(file, data)


class _Summed:
    """The writer, and a look at what goes into it on the way."""

    def __init__(self, writer: Writer, moved: Callable[[int], None], summed: bool) -> None:
        self.writer, self.moved = writer, moved
        self.digest = sha256() if summed else None
        self._room = memoryview(b"")

    def room(self, nbytes: int) -> memoryview:
        self._room = self.writer.room(nbytes)
        return self._room

    def filled(self, nbytes: int) -> None:
        if self.digest is not None:
            self.digest.update(self._room[:nbytes])
        self.writer.filled(nbytes)
        self.moved(nbytes)

    def runs(self, offset: int, nbytes: int) -> list[Run]:
        """The checksum of all that went through, of so many bytes at `offset`."""
        return [] if self.digest is None else [(offset, nbytes, self.digest.hexdigest())]


_CHANGED = "It changed while being read; run the merge again"
