"""The workers of a merge: each takes runs of bytes, reads, computes, and has the result written."""

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
from typing import Any, BinaryIO, Protocol

from ..errors import AdapterkitError, Corrupt, ShapeMismatch, storage_error
from ..io.direct import OpenFiles, Writer, read_all
from ..io.lazy import DType
from .arrays import Arrays, TorchArrays, Workspace
from .blocks import Block, blocks, runs
from .checksums import Run, digest_of
from .compute import BlockMerger
from .planned import Output, OutputFile
from .requantize import NORMS
from .staging_dir import Norms

RUN = 32 << 20
"""Output bytes that a worker takes at a time."""


@dataclass(slots=True, eq=False)
class Job:
    """A run of bytes of one output file: blocks to compute of `output`, or `nbytes` to copy from `source`.

    Or the `parts` of one packed weight, wherever in the file they are.
    """

    file: OpenFile
    offset: int
    nbytes: int
    source: tuple[str, int]
    output: Output | None = None
    blocks: tuple[Block, ...] = ()
    order: int = 0
    parts: tuple[Output, ...] = ()


@dataclass(slots=True, eq=False)
class OpenFile:
    """An output file being written: how many jobs are left, norms so far by output, fold and job, and checksums."""

    plan: OutputFile
    path: Path
    left: int = 0
    norms: dict[str, list[tuple[int, dict[int, float]]]] = field(default_factory=lambda: defaultdict(list))
    runs: list[tuple[int, int, str]] = field(default_factory=list)
    summed: bool = False


def create(path: Path, planned: OutputFile) -> None:
    """Makes the file with its header, at its full size."""
    with open(path, "wb") as file:
        file.write(planned.header)
        _reserve(file, planned.size)


def _reserve(file: BinaryIO, size: int) -> None:
    """Makes the file its full size with blocks of its own: no space is missed later, and writing is a third faster."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        file.truncate(size)


def jobs_of(file: OpenFile) -> list[Job]:
    """The jobs of a file, in the order of its bytes."""
    jobs: list[Job] = []
    together: dict[str, list[Output]] = {}
    for output in file.plan.outputs:
        if output.part is not None:
            together.setdefault(output.part.packed.name, []).append(output)
            continue
        if output.copied and output.source.span is not None:
            _extend(jobs, file, output)
            continue
        where = "" if output.source.span is None else output.source.span.path
        size = output.dtype.itemsize
        for order, run in enumerate(runs(blocks(output), RUN, size)):
            start, nbytes = output.offset + run[0].first * size, sum(block.elements for block in run) * size
            jobs.append(Job(file, start, nbytes, (where, 0), output, tuple(run), order))
    jobs += [_of_parts(file, parts) for parts in together.values()]
    return [piece for job in jobs for piece in _pieces(job)]


def _of_parts(file: OpenFile, parts: list[Output]) -> Job:
    """The job of one packed weight; its norms go by the part that names the folds."""
    named = next((part for part in parts if part.folds), parts[0])
    return Job(file, parts[0].offset, sum(part.nbytes for part in parts), ("", 0), named, parts=tuple(parts))


def _extend(jobs: list[Job], file: OpenFile, output: Output) -> None:
    """Adds a tensor that is copied: to the copy before it, where the bytes lie on in both files, or as a new one."""
    span = output.source.span
    assert span is not None
    last = jobs[-1] if jobs and jobs[-1].output is None else None
    if last is not None and last.offset + last.nbytes == output.offset:
        path, start = last.source
        if path == span.path and start + last.nbytes == span.offset:
            last.nbytes += output.nbytes
            return
    jobs.append(Job(file, output.offset, output.nbytes, (span.path, span.offset)))


def _pieces(job: Job) -> list[Job]:
    if job.output is not None or job.nbytes <= RUN:
        return [job]
    path, start = job.source
    return [
        Job(job.file, job.offset + at, min(RUN, job.nbytes - at), (path, start + at))
        for at in range(0, job.nbytes, RUN)
    ]


def norms_of(file: OpenFile) -> Norms:
    """Norm by output and fold, summed in the order of the jobs so that it does not depend on which ended first."""
    found: Norms = {}
    for output in file.plan.outputs:
        squares = [0.0] * (len(output.folds) + (0 if output.part is None else NORMS))
        for _, norms in sorted(file.norms.get(output.name, ()), key=lambda pair: pair[0]):
            for fold, square in norms.items():
                squares[fold] += square
        if output.folds:
            found[output.name] = [square**0.5 for square in squares]
    return found


# Lanes: blocks on their way from the disk through where they are computed and back, one or several at a time.
#
# In the host's memory a block is computed where it was read. To a device blocks go by staging memory, pinned where the
# device is CUDA, on a stream of their own; they are computed on a second and come back on a third, `DEPTH` of them at
# a time. It is one code path for every device of torch, whose streams are empty forms on the CPU: there it is tested,
# byte by byte against numpy. It has not been run on a card.


DEPTH = 3
"""Blocks in flight: one is on its way there, one is computed, one is on its way back."""

Host = Callable[[Block, memoryview], None]
Compute = Callable[[Block, Any, Any], None]


class Written(Protocol):
    """Where the bytes of blocks go, one behind another."""

    def room(self, nbytes: int) -> memoryview:
        """Memory for the next bytes."""

    def filled(self, nbytes: int) -> None:
        """So many bytes of that memory are those of a block."""


class Pipeline(Protocol):
    """One worker's way for blocks."""

    def computing(self) -> AbstractContextManager[Any]:
        """A context in which what is loaded and computed is so before any block that follows."""

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        """Takes blocks all the way; returns when the last is written.

        Args:
            blocks: of one tensor.
            source: the dtype of the bytes that are read.
            target: of the bytes that are written.
            read: fills a block's bytes.
            compute: computes a block from flat numbers into flat numbers.
            written: where the bytes of the blocks go, in their order.
        """


def lane_for(arrays: Arrays) -> Pipeline:
    """The pipeline of one worker."""
    return DevicePipeline(arrays) if isinstance(arrays, TorchArrays) else HostPipeline(arrays)


class HostPipeline:
    """A block at a time, from a buffer that is used again for every block to where it is written from."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._raw = bytearray()

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        for block in blocks:
            self._raw = _grown(self._raw, block.elements * source.itemsize)
            raw = memoryview(self._raw)[: block.elements * source.itemsize]
            out = written.room(block.elements * target.itemsize)
            read(block, raw)
            compute(block, self.arrays.over(raw, source), self.arrays.over(out, target))
            written.filled(len(out))


def _grown(held: bytearray, nbytes: int) -> bytearray:
    return held if len(held) >= nbytes else bytearray(nbytes)


class DevicePipeline:
    """Several blocks at a time, each in a slot of its own; a slot is taken again when its last block is written."""

    def __init__(self, arrays: TorchArrays) -> None:
        self.torch, self.device = arrays.torch, arrays.device
        module = self.torch.get_device_module(self.device)
        self.streams: Any = module if hasattr(module, "Stream") else self.torch.cpu
        # Without streams of its own, a device's copies must be over when they return.
        self.apart = self.streams is not self.torch.cpu
        self.up, self.work, self.down = (self._stream() for _ in range(3))
        self.slots = [_Slot(self) for _ in range(DEPTH)]

    def computing(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.streams.stream(self.work)
        return context

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        for position, block in enumerate(blocks):
            slot = self.slots[position % DEPTH]
            slot.finish(written)
            slot.start(block, source, target, read, compute)
        for position in range(len(blocks), len(blocks) + DEPTH):
            self.slots[position % DEPTH].finish(written)

    def _stream(self) -> Any:
        return self.streams.Stream(device=self.device) if self.apart else self.streams.Stream()


class _Slot:
    """Memory for one block, on the host and on the device, and the events that say how far it is."""

    def __init__(self, pipeline: DevicePipeline) -> None:
        self.lane, self.torch = pipeline, pipeline.torch
        self.sent, self.computed, self.fetched = (pipeline.streams.Event() for _ in range(3))
        empty = self.torch.empty(0, dtype=self.torch.uint8)
        self.given = self.made = self.there = self.result = empty
        self.pending: Block | None = None
        self.nbytes = 0

    def start(self, block: Block, source: DType, target: DType, read: Host, compute: Compute) -> None:
        """Reads a block and has everything else done to it; no waiting, where the device has streams."""
        pipeline, nbytes, self.nbytes = self.lane, block.elements * source.itemsize, block.elements * target.itemsize
        self._make_room(nbytes, self.nbytes)
        read(block, _bytes(self.given, nbytes))
        with pipeline.streams.stream(pipeline.up):
            self.there[:nbytes].copy_(self.given[:nbytes], non_blocking=pipeline.apart)
            self.sent.record(pipeline.up)
        with pipeline.computing():
            pipeline.work.wait_event(self.sent)
            raw, out = self._over(self.there, nbytes, source), self._over(self.result, self.nbytes, target)
            compute(block, raw, out)
            self.computed.record(pipeline.work)
        with pipeline.streams.stream(pipeline.down):
            pipeline.down.wait_event(self.computed)
            self.made[: self.nbytes].copy_(self.result[: self.nbytes], non_blocking=pipeline.apart)
            self.fetched.record(pipeline.down)
        self.pending = block

    def finish(self, written: Written) -> None:
        """Waits for the slot's block, if there is one, and has it written."""
        if self.pending is not None:
            self.fetched.synchronize()
            written.room(self.nbytes)[:] = _bytes(self.made, self.nbytes)
            written.filled(self.nbytes)
            self.pending = None

    def _make_room(self, given: int, made: int) -> None:
        """Memory belongs to the stream that first writes it: the allocator may hand it out while others work."""
        pipeline, pinned = self.lane, self.lane.device.type == "cuda"
        if len(self.given) < given:
            self.given = self.torch.empty(given, dtype=self.torch.uint8, pin_memory=pinned)
            with pipeline.streams.stream(pipeline.up):
                self.there = self.torch.empty(given, dtype=self.torch.uint8, device=pipeline.device)
        if len(self.made) < made:
            self.made = self.torch.empty(made, dtype=self.torch.uint8, pin_memory=pinned)
            with pipeline.computing():
                self.result = self.torch.empty(made, dtype=self.torch.uint8, device=pipeline.device)

    def _over(self, data: Any, nbytes: int, dtype: DType) -> Any:
        return data[:nbytes].view(getattr(self.torch, dtype.torch))


def _bytes(tensor: Any, nbytes: int) -> memoryview:
    return memoryview(tensor.numpy())[:nbytes]


# What one worker does with a job: reads, computes, and has written what comes of it.


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


class Worker:
    """What one worker holds: open files, a pipeline for blocks, memory for what is to be written."""

    def __init__(self, arrays: Arrays, moved: Callable[[int], None]) -> None:
        self.arrays, self.moved, self.workspace = arrays, moved, Workspace(arrays)
        self.open, self.writer = OpenFiles(), Writer()
        self._lane: Pipeline | None = None

    def do(self, job: Job) -> Made:
        """Does one job; what it made may still be on its way to the disk.

        Raises:
            Corrupt: a file has become shorter.
            StorageError: a file cannot be read or written.
            Malformed: see `BlockMerger`.
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
        self._lane = pipeline = self._lane or lane_for(self.arrays)
        with pipeline.computing():
            folder = BlockMerger(output, self.workspace)
            norms = folder.norms() if job.order == 0 else {}

        def compute(block: Block, raw: Any, out: Any) -> None:
            for fold, square in folder.compute(raw, out, block).items():
                norms[fold] = norms.get(fold, 0.0) + square

        written = _Summed(self.writer, self.moved, job.file.summed)
        pipeline.through(job.blocks, output.source.dtype, output.dtype, partial(self._read, output), compute, written)
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
