"""From a plan to a finished output: weights, the base's other files, the output's own record, and the report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, NetworkError, StorageError, storage_error
from ..quant import SIDE_FILES, Dequantized
from ..tensors.atomic import write_bytes
from ..tensors.checkpoint import INDEX, TORCH_INDEX
from ..tensors.locations import NOTE
from .arrays import arrays_for
from .planning import REPORT, Plan, index_of
from .stage import Norms, Stage

if TYPE_CHECKING:
    from .execute import Progress
    from .streaming import Supply

WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
}  # fmt: skip
"""Other forms of the base's weights: left out of the output, where they would be stale."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What a merge did.

    Attributes:
        out: where the output is; a uri where it is on a hub.
        plan: what was carried out.
        norms: Frobenius norm of each change, by tensor: one number an adapter that touches it.
        resumed: names of files that an earlier, interrupted run had finished.
        carried: the base's other files in the output.
        left_out: files of the base that are not in the output, because they hold its weights in another form.
        seconds: from the start of planning to the output being durable in place.
    """

    out: Path | str
    plan: Plan
    norms: Mapping[str, list[float]]
    resumed: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float

    def record(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "out": str(self.out), "seconds": round(self.seconds, 3), "bytes": self.plan.bytes,
            "targets": self.plan.targets, "files": [file.name for file in self.plan.files],
            "resumed": list(self.resumed), "carried": list(self.carried), "left_out": list(self.left_out),
            **self.plan.lineage(), "norms": dict(self.norms),
        }  # fmt: skip


def carry_out(
    plan: Plan, out: Path, device: str, progress: Progress | None, started: float, supply: Supply | None = None
) -> Report:
    """Executes a plan into `out`, its base brought by `supply` where it is not there; see `adapterkit.merge`."""
    names = [file.name for file in plan.files]
    stage = Stage(out, plan.digest, names, single=out.suffix == ".safetensors" and not plan.base.root.is_dir())
    with stage.locked():
        try:
            if stage.was_completed:
                return _completed(plan, stage, started)
            resumed = tuple(name for name in names if stage.finished(name))
            _check_space(plan, out, resumed)
            return _write(plan, stage, device, progress, started, resumed, supply)
        except NetworkError:
            # What is finished stays: the same command goes on with it.
            raise
        except (AdapterkitError, OSError, MemoryError):
            stage.discard()
            raise


def _completed(plan: Plan, stage: Stage, started: float) -> Report:
    """The report of an earlier run that was killed after its output was in place."""
    record = stage.target / REPORT
    norms = json.loads(record.read_text())["norms"] if record.exists() else {}
    stage.discard()
    return Report(stage.target, plan, norms, tuple(stage.files), (), (), time.perf_counter() - started)


def _write(
    plan: Plan, stage: Stage, device: str, progress: Progress | None, started: float, resumed: tuple[str, ...],
    supply: Supply | None,
) -> Report:  # fmt: skip
    from .execute import execute
    from .streaming import execute_streamed

    arrays = arrays_for(device)
    if supply is None:
        found = execute(plan, stage, arrays, progress)
    else:
        found = execute_streamed(plan, stage, arrays, progress, supply)
    norms = {name: values for file in plan.files for name, values in found[file.name].items()}
    carried: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if plan.base.root.is_dir():
        carried, left_out = _carry(plan, stage.out)
        _write_records(plan, stage.out, norms)
    stage.publish()
    return Report(stage.target, plan, norms, resumed, carried, left_out, time.perf_counter() - started)


def _carry(plan: Plan, out: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies the base's other files; returns the names copied and left out."""
    carried, left_out = [], []
    for file in sorted(_files(plan.base.root)):
        name = file.relative_to(plan.base.root).as_posix()
        if file in plan.base.files or name in (INDEX, TORCH_INDEX, REPORT, NOTE):
            continue
        if file.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json") or _stale(plan, name):
            left_out.append(name)
            continue
        carried.append(name)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, out / name)
        except OSError as error:
            raise storage_error(error, file) from error
    return tuple(carried), tuple(left_out)


def _stale(plan: Plan, name: str) -> bool:
    """Whether a file describes packed weights that the output does not have."""
    return isinstance(plan.base, Dequantized) and name in SIDE_FILES


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, hidden folders left out; links to files count, links to folders do not."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _files(entry)
        elif entry.is_file():
            yield entry


def _write_records(plan: Plan, out: Path, norms: Norms) -> None:
    if plan.config_changes and plan.base.config is not None:
        changed = {**plan.base.config, **plan.config_changes}
        config = {key: value for key, value in changed.items() if value is not None or key not in plan.config_changes}
        write_bytes(out / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    record = json.dumps({**plan.lineage(), "norms": norms}, indent=2, sort_keys=True)
    write_bytes(out / REPORT, (record + "\n").encode())
    index = index_of(plan)
    if index is not None:
        write_bytes(out / INDEX, index)


def _check_space(plan: Plan, out: Path, resumed: tuple[str, ...]) -> None:
    needed = sum(file.size for file in plan.files if file.name not in resumed)
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise storage_error(error, out.parent) from error
    if needed > free:
        raise StorageError(
            f"needs {needed:,} bytes, {free:,} are free", path=out.parent, cure="Free some space or write elsewhere"
        )
