"""Execute a plan with worker threads that read, compute and write at the same time.

A worker's memory does not grow with the model. Each worker needs memory for one input block, a float64 copy of this
block, and some output blocks. With torch, each worker needs `workers.DEPTH` times this memory.

If the base is on a hub, `streamed_engine` downloads each file before its first use, and deletes the file after its last
use.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from ..errors import Unsupported, storage_error
from ..io.lazy import files_kept_open
from .arrays import Arrays, devices_for
from .planned import OutputFile, Plan
from .staging_dir import Norms, StagingDir
from .workers import Job, JobResult, OpenFile, Worker, create, jobs_of, norms_of

if TYPE_CHECKING:
    from ..io.resolving import StreamedBase
    from .report import Engine


Progress = Callable[[int, int], None]


def execute(
    files: Sequence[OutputFile], stage: StagingDir, devices: Sequence[Arrays], progress: Progress | None, threads: int,
    *, link: bool = False, checksums: bool = False,
) -> dict[str, Norms]:  # fmt: skip
    """Write every unfinished weight file into the stage; return a map from each file to the norms of its changes.

    Args:
        files: the files of the plan.
        stage: the staging folder to write the files into.
        devices: one array library per device; the files are assigned to the devices in turn.
        progress: a function that is called with (bytes done, total bytes).
        threads: the number of workers; at least one per device is started.
        link: whether to write hard links to unchanged files of the base.
        checksums: whether to record checksums of the written bytes.

    Raises:
        AdapterkitError: the first error of any worker; the other workers then stop.
    """
    pending = [file for file in files if not stage.finished(file.name)]
    left = sum(output.nbytes for file in pending for output in file.outputs)
    total = sum(file.size for file in files)
    crew = _Scheduler(stage, devices, total - left, total, max(threads, len(devices)), link, checksums)
    # Limit the BLAS to one thread, because each worker keeps a core busy.
    with threadpool_limits(1, "blas"):
        crew.run(pending, progress)
    return {file.name: stage.norms_of(file.name) for file in files}


class _Scheduler:
    """Worker threads with one queue of jobs per device, and one thread that flushes complete files to disk."""

    def __init__(
        self, stage: StagingDir, devices: Sequence[Arrays], done: int, total: int, threads: int, link: bool,
        checksums: bool,
    ) -> None:  # fmt: skip
        self.stage, self.devices, self.done, self.total, self.threads = stage, devices, done, total, threads
        self.link, self.checksums = link, checksums
        # Limit the length of the queues. A file is created at full size when its jobs are queued, so with unlimited
        # queues all files would be created at the start.
        self.jobs: list[queue.Queue[Job | None]] = [queue.Queue(64) for _ in devices]
        self.written: queue.Queue[OpenFile | None] = queue.Queue()
        self.lock, self.settled, self.unfinished = threading.Lock(), threading.Condition(), 0
        self.withheld: deque[tuple[OpenFile, list[Job], int]] = deque()
        # The first error of any thread. While workers wait for a job, or the calling thread waits for a full queue or a
        # flush, they check this attribute every 0.1 s, so that all threads end soon.
        self.failure: BaseException | None = None

    def run(self, pending: list[OutputFile], progress: Progress | None) -> None:
        crew = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(self.threads)]
        finisher = threading.Thread(target=self._finish, daemon=True)
        for thread in (*crew, finisher):
            thread.start()
        try:
            self._feed(pending, crew, progress)
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            # None ends the thread that flushes files. Send None only after all workers have ended, because until then
            # a worker may still send a file to this thread.
            _join(crew)
            self.written.put(None)
            _join([finisher])
        if self.failure is not None:
            raise self.failure
        if progress is not None:
            progress(self.done, self.total)

    def _feed(self, pending: list[OutputFile], crew: list[threading.Thread], progress: Progress | None) -> None:
        for position, planned in enumerate(pending):
            if self.link and planned.whole is not None and self.stage.link(planned.name, planned.whole):
                self._moved(planned.size - len(planned.header))
                continue
            self._start(planned, position % len(self.devices), progress)
            if len(self.withheld) == len(self.devices):
                self._release(progress)
        while self.withheld:
            self._release(progress)
        for number in range(len(crew)):
            self._put(None, number % len(self.devices), progress)
        while any(worker.is_alive() for worker in crew):
            _join(crew, 0.1)
            self._report(progress)

    def _start(self, planned: OutputFile, device: int, progress: Progress | None) -> None:
        """Create a file, and queue all its jobs except the last job. `_release` queues the last job."""
        file = OpenFile(planned, self.stage.parts / planned.name)
        create(file.path, planned)
        jobs = jobs_of(file)
        if planned.whole is None and self.checksums:
            file.summed = True
            file.runs.append((0, len(planned.header), sha256(planned.header).hexdigest()))
        file.left = len(jobs)
        for job in jobs[:-1]:
            self._put(job, device, progress)
        self.withheld.append((file, jobs[-1:], device))

    def _release(self, progress: Progress | None) -> None:
        """Wait until all earlier files are flushed to disk, then queue the last job of the oldest file in `withheld`.

        So at any time, at most one complete file is not flushed. If the merge is interrupted, only this file and the
        incomplete files must be written again.
        """
        while self.failure is None and self.unfinished:
            with self.settled:
                self.settled.wait(0.1)
            self._report(progress)
        file, last, device = self.withheld.popleft()
        with self.settled:
            self.unfinished += 1
        if not last:  # The file has no tensors and no jobs.
            self.written.put(file)
        for job in last:
            self._put(job, device, progress)

    def _put(self, job: Job | None, device: int, progress: Progress | None) -> None:
        while self.failure is None:
            try:
                return self.jobs[device].put(job, timeout=0.1)
            except queue.Full:
                self._report(progress)
        return None

    def _report(self, progress: Progress | None) -> None:
        if progress is not None:
            progress(self.done, self.total)

    def _work(self, number: int) -> None:
        device = number % len(self.devices)
        hands = Worker(self.devices[device], self._moved)
        try:
            with hands.arrays.quiet(), files_kept_open():
                self._take_jobs(hands, self.jobs[device])
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            hands.close()

    def _take_jobs(self, hands: Worker, jobs: queue.Queue[Job | None]) -> None:
        while self.failure is None:
            try:
                job = jobs.get(timeout=0.1)
            except queue.Empty:
                continue
            if job is None:
                return
            result = hands.do(job)
            # The callback runs when the bytes are in the file, usually on the writer's thread. This worker does not
            # wait for the callback, but takes its next job.
            result.written.add_done_callback(partial(self._done, job, result))

    def _done(self, job: Job, result: JobResult, written: Future[None]) -> None:
        error = written.exception()
        if error is not None:
            self.failure = self.failure or (
                storage_error(error, job.file.path) if isinstance(error, OSError) else error
            )
            return
        with self.lock:
            job.file.runs += result.runs
            if job.output is not None and result.norms:
                job.file.norms[job.output.name].append((job.order, result.norms))
            job.file.left -= 1
            last = job.file.left == 0
        if last:
            self.written.put(job.file)

    def _finish(self) -> None:
        # A flush may take seconds. It runs in this separate thread, so that the workers can continue.
        while (file := self.written.get()) is not None:
            try:
                if self.failure is None:
                    self.stage.finish(file.plan.name, norms_of(file), sorted(file.runs))
            except BaseException as error:
                self.failure = self.failure or error
            with self.settled:
                self.unfinished -= 1
                self.settled.notify()

    def _moved(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes


def _join(threads: list[threading.Thread], timeout: float | None = None) -> None:
    for thread in threads:
        thread.join(timeout)


def streamed_engine(device: str, base: StreamedBase) -> Engine:
    """Return an engine that runs a plan on a streamed base, one output file after another.

    Raises:
        Unsupported: a tensor, such as a quantized weight, is not stored as consecutive bytes in one file of the base.
        AdapterkitError: a download or a worker fails.
    """

    def run(plan: Plan, stage: StagingDir, progress: Progress | None) -> dict[str, Norms]:
        devices = devices_for(device)
        pending = [file for file in plan.files if not stage.finished(file.name)]
        uses = [_sources(file) for file in pending]
        done = plan.bytes - sum(file.size for file in pending)
        for position, file in enumerate(pending):
            base.bring(sorted(uses[position]))
            execute(
                [file],
                stage,
                [devices[position % len(devices)]],
                _from(done, plan.bytes, progress),
                plan.workers,
                checksums=plan.checksums,
            )
            done += file.size
            base.drop(uses[position].difference(*uses[position + 1 :]))
        return {file.name: stage.norms_of(file.name) for file in plan.files}

    return run


def _sources(file: OutputFile) -> set[str]:
    """Return the paths of the base's files that an output file needs."""
    recorded = set()
    for output in file.outputs:
        tensors = [output.source, *(fold.seen.tensor for fold in output.folds if fold.seen is not None)]
        for tensor in tensors:
            if tensor.span is None:
                cure = "Omit --stream (stream=), so that the whole base is downloaded first"
                raise Unsupported(
                    "a quantized weight, or a weight that gains rows, cannot be streamed", where=output.name, cure=cure
                )
            recorded.add(tensor.span.path)
    return recorded


def _from(done: int, total: int, progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda more, _: progress(done + more, total)
