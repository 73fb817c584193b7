"""Run a plan with a base on a hub, whose files are downloaded before their first use and deleted after their last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import Unsupported
from .arrays import devices_for
from .execute import execute
from .planned import OutputFile, Plan
from .report import Engine
from .staging_dir import Norms, StagingDir

if TYPE_CHECKING:
    from ..io.resolving import StreamedBase
    from .arrays import Arrays
    from .execute import Progress


def streamed_engine(device: str, base: StreamedBase) -> Engine:
    """Return an engine that runs a plan on a streamed base, one output file after another.

    Raises:
        Unsupported: a tensor of the base does not consist of consecutive bytes in one file, such as a quantized weight.
        AdapterkitError: as for `execute`, or a download fails.
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
                _nth(devices, position),
                _from(done, plan.bytes, progress),
                plan.workers,
                checksums=plan.checksums,
            )
            done += file.size
            base.drop(uses[position].difference(*uses[position + 1 :]))
        return {file.name: stage.norms_of(file.name) for file in plan.files}

    return run


def _nth(devices: Sequence[Arrays], position: int) -> list[Arrays]:
    """Return a list with device number `position`, modulo the number of devices."""
    return [devices[position % len(devices)]]


def _sources(file: OutputFile) -> set[str]:
    """Return the paths of the base's files that an output file needs."""
    found = set()
    for output in file.outputs:
        tensors = [output.source, *(fold.seen.tensor for fold in output.folds if fold.seen is not None)]
        for tensor in tensors:
            if tensor.span is None:
                cure = "Omit --stream (stream=): the base is then fetched whole first"
                raise Unsupported(
                    "a packed weight, or one that gains rows, cannot be streamed", where=output.name, cure=cure
                )
            found.add(tensor.span.path)
    return found


def _from(done: int, total: int, progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda more, _: progress(done + more, total)
