"""The workers of a merge, which read, compute and write runs of output bytes."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from ..errors import USE_ITS_BASE_OR_DOWNLOAD, AdapterkitError, Corrupt, ShapeMismatch, storage_error
from ..io.direct import BUFFER, OpenFiles, Writer, read_all
from ..io.lazy import DType, Lazy
from ..linalg.namespace import Numbers
from .arrays import Arrays, TorchArrays, Workspace
from .blocks import Block, blocks, runs
from .checksums import Run, digest_of
from .compute import BlockMerger
from .planned import Output, OutputFile, PackedRun
from .requantize import NORMS
from .staging_dir import Norms

if TYPE_CHECKING:
    import torch

RUN = 32 << 20
"""The number of output bytes in a job, approximately."""


@dataclass(slots=True, eq=False)
class Job:
    """A task that writes bytes of an output file. The job computes blocks of `output`, or copies bytes from `source`.

    If `parts` is empty, the job writes consecutive bytes. Otherwise, the job writes a packed weight. `parts` are the
    stored tensors of this weight, and may be anywhere in the file. If `run` is set, the job writes only the rows of
    this run.
    """

    file: OpenFile
    offset: int
    nbytes: int
    source: tuple[str, int]
    output: Output | None = None
    blocks: tuple[Block, ...] = ()
    order: int = 0
    parts: tuple[Output, ...] = ()
    run: PackedRun | None = None


@dataclass(slots=True, eq=False)
class OpenFile:
    """An output file that is being written, with the number of unfinished jobs and the results of finished jobs."""

    plan: OutputFile
    path: Path
    left: int = 0
    norms: dict[str, list[tuple[int, dict[int, float]]]] = field(default_factory=lambda: defaultdict(list))
    runs: list[tuple[int, int, str]] = field(default_factory=list)
    summed: bool = False


def create(path: Path, planned: OutputFile) -> None:
    """Create an output file with its header and its full size; the tensors' bytes are written later."""
    with open(path, "wb") as file:
        file.write(planned.header)
        _reserve(file, planned.size)


def _reserve(file: BinaryIO, size: int) -> None:
    """Allocate a file's disk blocks in advance: a full disk raises an error at once, and writing is a third faster."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        # Some file systems cannot allocate blocks in advance, and macOS and Windows lack the function. In these cases,
        # only set the file's size.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        file.truncate(size)


def jobs_of(file: OpenFile) -> list[Job]:
    """Return the jobs of a file, in the order of its bytes; the jobs of packed weights come last."""
    jobs: list[Job] = []
    together: dict[str, list[Output]] = {}
    for output in file.plan.outputs:
        if output.part is not None:
            together.setdefault(output.part.packed.name, []).append(output)
            continue
        if output.copied and output.source.span is not None:
            _extend(jobs, file, output.offset, output.nbytes, output.source)
            continue
        where = "" if output.source.span is None else output.source.span.path
        size = output.dtype.itemsize
        for order, run in enumerate(runs(blocks(output), RUN, size)):
            start, nbytes = output.offset + run[0].first * size, sum(block.elements for block in run) * size
            jobs.append(Job(file, start, nbytes, (where, 0), output, tuple(run), order))
    for parts in together.values():
        jobs += _of_parts(file, parts)
    return [piece for job in jobs for piece in _pieces(job)]


def _of_parts(file: OpenFile, parts: list[Output]) -> list[Job]:
    """Return the jobs of one packed weight.

    The weight's norms are recorded under the name of the stored tensor that has the planned updates.
    """
    named = next((part for part in parts if part.folds), parts[0])
    assert named.part is not None
    runs = named.part.runs()
    if runs is None:
        return [Job(file, parts[0].offset, sum(part.nbytes for part in parts), ("", 0), named, parts=tuple(parts))]
    jobs: list[Job] = []
    offsets = {part.name: part.offset for part in parts}
    for order, run in enumerate(runs):
        # A sharded base may store a weight's tensors in several files. Each file has jobs for its own tensors.
        places = [(name, place) for name, place in run.places.items() if name in offsets]
        if not places:
            continue
        name, (start, nbytes) = places[0]
        if run.source is not None and run.source.span is not None:
            _extend(jobs, file, offsets[name] + start, nbytes, run.source)
        else:
            all_ = sum(nbytes for _, (_, nbytes) in places)
            jobs.append(Job(file, offsets[name] + start, all_, ("", 0), named, (), order, tuple(parts), run))
    return jobs


def _extend(jobs: list[Job], file: OpenFile, offset: int, nbytes: int, source: Lazy) -> None:
    """Add a job that copies a tensor, or extend the previous copy if the bytes are adjacent in both files."""
    span = source.span
    assert span is not None
    last = jobs[-1] if jobs and jobs[-1].output is None else None
    if last is not None and last.offset + last.nbytes == offset:
        path, start = last.source
        if path == span.path and start + last.nbytes == span.offset:
            last.nbytes += nbytes
            return
    jobs.append(Job(file, offset, nbytes, (span.path, span.offset)))


def _pieces(job: Job) -> list[Job]:
    if job.output is not None or job.nbytes <= RUN:
        return [job]
    path, start = job.source
    return [
        Job(job.file, job.offset + at, min(RUN, job.nbytes - at), (path, start + at))
        for at in range(0, job.nbytes, RUN)
    ]


def norms_of(file: OpenFile) -> Norms:
    """Return the norms of all output tensors that have planned updates, as a map from tensor names to lists of norms.

    The first norms in a list belong to the planned updates, in order. A packed weight has `NORMS` more norms, which
    measure the damage that quantizing causes. The squared norms are summed over a tensor's jobs in a fixed order.
    """
    norms_by_output: Norms = {}
    for output in file.plan.outputs:
        squares = [0.0] * (len(output.folds) + (0 if output.part is None else NORMS))
        # Sort by job, because a sum of floats depends on the order, and two equal merges must write identical records.
        for _, norms in sorted(file.norms.get(output.name, ()), key=lambda pair: pair[0]):
            for fold, square in norms.items():
                squares[fold] += square
        if output.folds:
            norms_by_output[output.name] = [square**0.5 for square in squares]
    return norms_by_output


# Pipelines move blocks from the disk to the computing device and back.
#
# On the host, a block is read into a buffer, and its result is computed into the writer's memory. Blocks for another
# device go through staging memory, which is pinned for CUDA. The device receives blocks on one stream, computes on a
# second stream, and sends blocks back on a third stream, with `DEPTH` blocks in flight. All torch devices share this
# code. On torch's CPU device the streams do nothing, and tests compare the bytes with numpy's bytes. The code has not
# been run on a GPU.


DEPTH = 3
"""The number of blocks in flight: one on the way to the device, one being computed, one on the way back."""

Host = Callable[[Block, memoryview], None]
Compute = Callable[[Block, Numbers, Numbers], None]


class OutputSink(Protocol):
    """Receives the bytes of consecutive blocks."""

    def room(self, nbytes: int) -> memoryview:
        """Return memory for the next `nbytes` bytes."""
        ...

    def filled(self, nbytes: int) -> None:
        """Write the first `nbytes` bytes of the memory that the last call of `room` returned."""


class Pipeline(Protocol):
    """Moves one worker's blocks through a device."""

    def computing(self) -> AbstractContextManager[object]:
        """Return a context manager for code that computes tensors for `through`.

        A tensor that is computed in the `with` block is ready when `through` uses it.
        """
        ...

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: OutputSink
    ) -> None:
        """Read, compute and write blocks; return when the last block has been passed to `written`.

        Args:
            blocks: blocks of one tensor.
            source: the dtype of the bytes that are read.
            target: the dtype of the bytes that are written.
            read: a function of (block, memory) that fills the memory with the block's bytes.
            compute: a function of (block, input, output) that computes the flat array `output` from the flat `input`.
            written: the sink, which receives the results in the order of the blocks.
        """


def pipeline_for(arrays: Arrays) -> Pipeline:
    """Create the pipeline of one worker."""
    return DevicePipeline(arrays) if isinstance(arrays, TorchArrays) else HostPipeline(arrays)


class HostPipeline:
    """Reads one block after another into a reused buffer, and computes each block directly into the writer's memory."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._raw = bytearray()

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: OutputSink
    ) -> None:
        for block in blocks:
            nbytes = block.elements * source.itemsize
            if len(self._raw) < nbytes:
                self._raw = bytearray(nbytes)
            raw = memoryview(self._raw)[:nbytes]
            out = written.room(block.elements * target.itemsize)
            read(block, raw)
            compute(block, self.arrays.over(raw, source), self.arrays.over(out, target))
            written.filled(len(out))


class DevicePipeline:
    """Keeps several blocks in flight, each in its slot. A slot is reused after its block was passed to the writer."""

    def __init__(self, arrays: TorchArrays) -> None:
        self.torch, self.device = arrays.torch, arrays.device
        module = self.torch.get_device_module(self.device)
        self.streams: Any = module if hasattr(module, "Stream") else self.torch.cpu
        # On a device without streams, use blocking copies, because only blocking copies guarantee the order there.
        self.has_streams = self.streams is not self.torch.cpu
        self.up, self.work, self.down = (self._stream() for _ in range(3))
        self.slots = [_Slot(self) for _ in range(DEPTH)]

    def computing(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self.streams.stream(self.work)
        return context

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: OutputSink
    ) -> None:
        for position, block in enumerate(blocks):
            slot = self.slots[position % DEPTH]
            slot.finish(written)
            slot.start(block, source, target, read, compute)
        # Finish the slots in the order of their blocks.
        for position in range(len(blocks), len(blocks) + DEPTH):
            self.slots[position % DEPTH].finish(written)

    def _stream(self) -> torch.Stream:
        stream: torch.Stream = self.streams.Stream(device=self.device) if self.has_streams else self.streams.Stream()
        return stream


class _Slot:
    """The memory for one block, on the host and on the device, and the events that mark its progress."""

    def __init__(self, pipeline: DevicePipeline) -> None:
        self.pipeline, self.torch = pipeline, pipeline.torch
        self.sent, self.computed, self.fetched = (pipeline.streams.Event() for _ in range(3))
        empty = self.torch.empty(0, dtype=self.torch.uint8)
        self.host_raw = self.host_result = self.device_raw = self.device_result = empty
        self.pending: Block | None = None
        self.nbytes = 0

    def start(self, block: Block, source: DType, target: DType, read: Host, compute: Compute) -> None:
        """Read a block, and queue its transfers and its computation.

        On a device with streams, the method does not wait for the transfers and the computation.
        """
        pipeline, nbytes = self.pipeline, block.elements * source.itemsize
        self.nbytes = block.elements * target.itemsize
        self._make_room(nbytes, self.nbytes)
        read(block, _bytes(self.host_raw, nbytes))
        with pipeline.streams.stream(pipeline.up):
            self.device_raw[:nbytes].copy_(self.host_raw[:nbytes], non_blocking=pipeline.has_streams)
            self.sent.record(pipeline.up)
        with pipeline.computing():
            # Let the device wait instead of this thread, so that the thread reads the next block meanwhile.
            pipeline.work.wait_event(self.sent)
            raw = self._over(self.device_raw, nbytes, source)
            out = self._over(self.device_result, self.nbytes, target)
            compute(block, raw, out)
            self.computed.record(pipeline.work)
        with pipeline.streams.stream(pipeline.down):
            pipeline.down.wait_event(self.computed)
            result = self.device_result[: self.nbytes]
            self.host_result[: self.nbytes].copy_(result, non_blocking=pipeline.has_streams)
            self.fetched.record(pipeline.down)
        self.pending = block

    def finish(self, written: OutputSink) -> None:
        """If the slot has a block, wait for the block's result and pass the result to `written`."""
        if self.pending is not None:
            self.fetched.synchronize()
            written.room(self.nbytes)[:] = _bytes(self.host_result, self.nbytes)
            written.filled(self.nbytes)
            self.pending = None

    def _make_room(self, raw: int, result: int) -> None:
        """Enlarge the slot's memory to `raw` bytes of input and `result` bytes of output."""
        pipeline, pinned = self.pipeline, self.pipeline.device.type == "cuda"
        # Allocate device memory on the stream that first writes to it. Torch's allocator orders the reuse of freed
        # memory only within the allocating stream. If another stream wrote first, it could overwrite memory that
        # earlier work on the allocating stream still uses.
        if len(self.host_raw) < raw:
            self.host_raw = self.torch.empty(raw, dtype=self.torch.uint8, pin_memory=pinned)
            with pipeline.streams.stream(pipeline.up):
                self.device_raw = self.torch.empty(raw, dtype=self.torch.uint8, device=pipeline.device)
        if len(self.host_result) < result:
            self.host_result = self.torch.empty(result, dtype=self.torch.uint8, pin_memory=pinned)
            with pipeline.computing():
                self.device_result = self.torch.empty(result, dtype=self.torch.uint8, device=pipeline.device)

    def _over(self, data: torch.Tensor, nbytes: int, dtype: DType) -> Numbers:
        return cast(Numbers, data[:nbytes].view(getattr(self.torch, dtype.torch)))


def _bytes(tensor: torch.Tensor, nbytes: int) -> memoryview:
    return tensor.numpy().data[:nbytes]


# A worker reads the bytes of a job, computes the result, and passes the result to its writer.


@dataclass(frozen=True, slots=True)
class JobResult:
    """The result of a job.

    Attributes:
        norms: a map from the indices of planned updates to the squared norms of their changes. For a packed weight, the
            map also has entries at the next `NORMS` indices: squared norms that measure the damage from quantizing.
        runs: (offset, size in bytes, sha256) of each written range; empty if the file's checksums are not recorded.
        written: a future that completes when the job's bytes are in the file. If writing fails, the future raises the
            OSError.
    """

    norms: dict[int, float]
    runs: list[Run]
    written: Future[None]


class Worker:
    """Does the jobs of one thread. Each worker has its own open files, pipeline and writer."""

    def __init__(self, arrays: Arrays, moved: Callable[[int], None]) -> None:
        self.arrays, self.moved, self.workspace = arrays, moved, Workspace(arrays)
        self.open, self.writer = OpenFiles(), Writer()
        self._pipeline: Pipeline | None = None

    def do(self, job: Job) -> JobResult:
        """Do one job. When the method returns, the job's bytes may not have reached the disk yet.

        Raises:
            Corrupt: an input file is shorter than when the merge began.
            StorageError: a file cannot be read or written.
            Malformed: as for `BlockMerger`.
            ShapeMismatch: an update's formula cannot be computed with the update's tensors.
        """
        self.writer.begin(str(job.file.path), job.offset)
        try:
            norms, runs = self._compute_job(job)
            return JobResult(norms, runs, self.writer.finish())
        except EOFError:
            raise Corrupt("the file ends before its last tensor", path=job.source[0], cure=_CHANGED) from None
        except OSError as error:
            raise storage_error(error, error.filename or job.file.path) from error
        except AdapterkitError as error:
            raise error.at(where=job.output.name if job.output else None) from error.__cause__
        except (ValueError, IndexError, ZeroDivisionError) as error:
            if job.output is None or not job.output.folds:
                raise
            # numpy raises these errors for sizes that validation cannot exclude, such as a rank of 0.
            updates = [update for fold in job.output.folds for update in fold.updates]
            methods = " and ".join(dict.fromkeys(update.method for update in updates))
            why = f"the formula of {methods} cannot be computed for this weight ({error})"
            path = next((update.file for update in updates if update.file is not None), None)
            raise ShapeMismatch(why, path=path, where=job.output.name, cure=USE_ITS_BASE_OR_DOWNLOAD) from error

    def close(self) -> None:
        """Wait for pending writes and close the files."""
        self.writer.close()
        self.open.close()

    def _compute_job(self, job: Job) -> tuple[dict[int, float], list[Run]]:
        if job.output is None:
            return {}, self._copy(job)
        if job.run is not None:
            return self._pack_rows(job.run, job)
        return self._pack(job.output, job) if job.parts else self._compute(job.output, job)

    def _copy(self, job: Job) -> list[Run]:
        """Let the operating system copy the bytes. For a checksum, read the source again, from the page cache."""
        path, start = job.source
        source = self.open(path)
        self.writer.copy(source, start, job.nbytes, self.moved)
        return [(job.offset, job.nbytes, digest_of(source, start, job.nbytes))] if job.file.summed else []

    def _compute(self, output: Output, job: Job) -> tuple[dict[int, float], list[Run]]:
        self._pipeline = pipeline = self._pipeline or pipeline_for(self.arrays)
        with pipeline.computing():
            folder = BlockMerger(output, self.workspace)
            # `norms()` returns squared norms of the whole tensor. Only the tensor's first job includes them, because
            # `norms_of` sums the squared norms of all jobs.
            norms = folder.norms() if job.order == 0 else {}

        def compute(block: Block, raw: Numbers, out: Numbers) -> None:
            for fold, square in folder.compute(raw, out, block).items():
                norms[fold] = norms.get(fold, 0.0) + square

        written = _Summed(self.writer, self.moved, job.file.summed)
        pipeline.through(job.blocks, output.source.dtype, output.dtype, partial(self._read, output), compute, written)
        return norms, written.runs(job.offset, job.nbytes)

    def _pack(self, output: Output, job: Job) -> tuple[dict[int, float], list[Run]]:
        assert output.part is not None
        data, norms = output.part.compute(self.workspace)
        runs = [run for part in job.parts for run in self._put(job, part.offset, data[part.name])]
        return norms if output.folds else {}, runs

    def _put(self, job: Job, offset: int, data: bytes | bytearray) -> list[Run]:
        """Write bytes at `offset`, which may be anywhere in the file, as a new run of the writer."""
        self.writer.finish()
        self.writer.begin(str(job.file.path), offset)
        written = _Summed(self.writer, self.moved, job.file.summed)
        written.write(data)
        return written.runs(offset, len(data))

    def _pack_rows(self, run: PackedRun, job: Job) -> tuple[dict[int, float], list[Run]]:
        """Write some rows of a packed weight into its stored tensors in the job's file, one tensor after another."""
        assert job.output is not None
        offsets = {part.name: part.offset for part in job.parts}
        first, *others = (name for name in run.places if name in offsets)
        written, later = _Summed(self.writer, self.moved, job.file.summed), {name: bytearray() for name in others}

        def write(name: str, data: bytes) -> None:
            if name == first:
                written.write(data)
            elif name in later:
                later[name] += data

        if run.source is not None:
            write(first, bytes(run.source.fetch()))
            norms = {}
        else:
            norms = run.compute(self.workspace, write)
        runs = written.runs(job.offset, run.places[first][1])
        for name, data in later.items():
            runs += self._put(job, offsets[name] + run.places[name][0], data)
        return norms if job.output.folds else {}, runs

    def _read(self, output: Output, block: Block, data: memoryview) -> None:
        span = output.source.span
        if span is None:
            data[:] = output.source.read(block.first, block.elements)
        else:
            file = self.open(span.path)
            file.seek(span.offset + block.first * output.source.dtype.itemsize)
            read_all(file, data)


class _Summed:
    """Passes bytes to the writer; if `summed` is true, also computes their sha256."""

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

    def write(self, data: bytes | bytearray) -> None:
        """Copy bytes into the writer's memory, and write them."""
        for start in range(0, len(data), BUFFER):
            piece = data[start : start + BUFFER]
            self.room(len(piece))[:] = piece
            self.filled(len(piece))

    def runs(self, offset: int, nbytes: int) -> list[Run]:
        """Return one run: `offset`, `nbytes` and the sha256 of all bytes. Return no run if `summed` was false."""
        return [] if self.digest is None else [(offset, nbytes, self.digest.hexdigest())]


_CHANGED = "Run the merge again: the file changed while it was read"
