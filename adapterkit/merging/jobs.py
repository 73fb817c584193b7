"""Jobs: an output file cut into runs of bytes that workers take one at a time."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .blocks import Block, blocks, runs
from .planned import Output, OutputFile
from .requantize import NORMS
from .stage import Norms

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
