"""Carrying out a plan: workers read, compute and write at the same time; files are finished beside them.

Nothing a worker holds grows with the model: a block in, its float64 image, a block out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from threadpoolctl import threadpool_limits

from ..errors import AdapterkitError, Corrupt, storage_error
from ..tensors.copying import OpenFiles, WriteBehind, copy_range, read_all, write_all
from .arrays import Arrays, Workspace
from .compute import Block, Folder
from .jobs import Job, OpenFile, create, jobs_of, norms_of
from .planning import Output, OutputFile
from .stage import Norms, Stage

Progress = Callable[[int, int], None]


def execute(
    files: Sequence[OutputFile], stage: Stage, arrays: Arrays, progress: Progress | None, threads: int, *,
    link: bool = False,
) -> dict[str, Norms]:  # fmt: skip
    """Writes every weight file that is not finished yet into the stage; returns the norms by file.

    Raises:
        AdapterkitError: the first fault of any worker; the others stop.
    """
    pending = [file for file in files if not stage.finished(file.name)]
    left = sum(output.nbytes for file in pending for output in file.outputs)
    total = sum(file.size for file in files)
    crew = _Crew(stage, arrays, total - left, total, threads, link)
    with threadpool_limits(1, "blas"):
        crew.run(pending, progress)
    return {file.name: stage.norms_of(file.name) for file in files}


class _Crew:
    """Workers on a queue of jobs, and one finisher that makes whole files durable."""

    def __init__(self, stage: Stage, arrays: Arrays, done: int, total: int, threads: int, link: bool) -> None:
        self.stage, self.arrays, self.done, self.total, self.threads = stage, arrays, done, total, threads
        self.link = link
        self.jobs: queue.Queue[Job | None] = queue.Queue(64)
        self.written: queue.Queue[OpenFile | None] = queue.Queue()
        self.lock, self.settled, self.unfinished = threading.Lock(), threading.Condition(), 0
        self.failure: BaseException | None = None

    def run(self, pending: list[OutputFile], progress: Progress | None) -> None:
        crew = [threading.Thread(target=self._work, daemon=True) for _ in range(self.threads)]
        finisher = threading.Thread(target=self._finish, daemon=True)
        for thread in (*crew, finisher):
            thread.start()
        try:
            self._feed(pending, crew, progress)
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            _join(crew)
            self.written.put(None)
            _join([finisher])
        if self.failure is not None:
            raise self.failure
        if progress is not None:
            progress(self.done, self.total)

    def _feed(self, pending: list[OutputFile], crew: list[threading.Thread], progress: Progress | None) -> None:
        for planned in pending:
            if self.link and planned.whole is not None and self.stage.link(planned.name, planned.whole):
                self._moved(planned.size - len(planned.header))
                continue
            file = OpenFile(planned, self.stage.parts / planned.name)
            create(file.path, planned)
            jobs = jobs_of(file)
            file.left = len(jobs)
            with self.settled:
                self.unfinished += 1
            if not jobs:
                self.written.put(file)
            for job in jobs[:-1]:
                self._put(job, progress)
            self._await_the_others(progress)
            for job in jobs[-1:]:
                self._put(job, progress)
        for _ in crew:
            self._put(None, progress)
        while any(worker.is_alive() for worker in crew):
            _join(crew, 0.1)
            self._report(progress)

    def _await_the_others(self, progress: Progress | None) -> None:
        """Lets a file become whole only when those before it are finished: so no more than one is ever done again."""
        while self.failure is None and self.unfinished > 1:
            with self.settled:
                self.settled.wait(0.1)
            self._report(progress)

    def _put(self, job: Job | None, progress: Progress | None) -> None:
        while self.failure is None:
            try:
                return self.jobs.put(job, timeout=0.1)
            except queue.Full:
                self._report(progress)
        return None

    def _report(self, progress: Progress | None) -> None:
        if progress is not None:
            progress(self.done, self.total)

    def _work(self) -> None:
        hands = _Hands(self.arrays, self._moved)
        try:
            with self.arrays.quiet():
                self._take_jobs(hands)
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            hands.close()

    def _take_jobs(self, hands: _Hands) -> None:
        while self.failure is None:
            try:
                job = self.jobs.get(timeout=0.1)
            except queue.Empty:
                continue
            if job is None:
                return
            self._done(job, hands.do(job))

    def _done(self, job: Job, norms: dict[int, float]) -> None:
        with self.lock:
            if job.output is not None and norms:
                job.file.norms[job.output.name].append((job.order, norms))
            job.file.left -= 1
            last = job.file.left == 0
        if last:
            self.written.put(job.file)

    def _finish(self) -> None:
        while (file := self.written.get()) is not None:
            try:
                if self.failure is None:
                    self.stage.finish(file.plan.name, norms_of(file))
            except BaseException as error:
                self.failure = self.failure or error
            with self.settled:
                self.unfinished -= 1
                self.settled.notify()

    def _moved(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes


class _Hands:
    """What one worker holds: open files and two buffers that are used again for every block."""

    def __init__(self, arrays: Arrays, moved: Callable[[int], None]) -> None:
        self.arrays, self.moved, self.workspace = arrays, moved, Workspace(arrays)
        self.open = OpenFiles()
        self.raw = self.out = bytearray()
        self.behind = WriteBehind()

    def do(self, job: Job) -> dict[int, float]:
        """Does one job; returns the squared norms it found, by fold."""
        target = self.open(str(job.file.path), "r+b")
        try:
            if job.output is None:
                source = self.open(job.source[0], "rb")
                copy_range(source, target, job.source[1], job.offset, job.nbytes, self.moved)
                norms = {}
            elif job.parts:
                norms = self._pack(job, target)
            else:
                norms = self._compute(job.output, job, target)
            self.behind(target, job.offset, job.nbytes)
            return norms
        except EOFError:
            raise Corrupt("the file ends before its last tensor", path=job.source[0], cure=_CHANGED) from None
        except OSError as error:
            raise storage_error(error, error.filename or job.file.path) from error
        except AdapterkitError as error:
            raise error.at(where=job.output.name if job.output else None) from error.__cause__

    def _compute(self, output: Output, job: Job, target: BinaryIO) -> dict[int, float]:
        folder = Folder(output, self.workspace)
        norms = folder.norms() if job.order == 0 else {}
        for block in job.blocks:
            raw = self._read(output, block)
            data = self._room("out", block.elements * output.dtype.itemsize)
            for fold, square in folder.compute(raw, self.arrays.over(data, output.dtype), block).items():
                norms[fold] = norms.get(fold, 0.0) + square
            target.seek(output.offset + block.first * output.dtype.itemsize)
            write_all(target, data)
            self.moved(len(data))
        return norms

    def _pack(self, job: Job, target: BinaryIO) -> dict[int, float]:
        assert job.output is not None
        assert job.output.part is not None
        made, norms = job.output.part.compute(self.workspace)
        for output in job.parts:
            target.seek(output.offset)
            write_all(target, memoryview(made[output.name]))
            self.moved(output.nbytes)
        return norms if job.output.folds else {}

    def _read(self, output: Output, block: Block) -> Any:
        size = output.source.dtype.itemsize
        data = self._room("raw", block.elements * size)
        span = output.source.span
        if span is None:
            data[:] = output.source.read(block.first, block.elements)
        else:
            file = self.open(span.path, "rb")
            file.seek(span.offset + block.first * size)
            read_all(file, data)
        return self.arrays.over(data, output.source.dtype)

    def _room(self, which: str, nbytes: int) -> memoryview:
        held: bytearray = getattr(self, which)
        if len(held) < nbytes:
            held = bytearray(nbytes)
            setattr(self, which, held)
        return memoryview(held)[:nbytes]

    def close(self) -> None:
        self.open.close()


def _join(threads: list[threading.Thread], timeout: float | None = None) -> None:
    for thread in threads:
        thread.join(timeout)


_CHANGED = "It changed while being read; run the merge again"
