"""Run a plan: write the weights, the companion files and the output's record, and return a report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.tables import html_table
from ..errors import AdapterkitError, NetworkError, StorageError, storage_error
from ..io.atomic import write_bytes
from ..io.checkpoint import INDEX
from ..io.stages import stage as begin
from ..io.staging import check_free, digest_of, keep_result, kept_result, listed
from ..quant import config_file
from .arrays import devices_for
from .checksums import KEY, record_of
from .companions import CARD, REPORT
from .planned import Plan
from .planning import index_of
from .requantize import damage_of
from .staging_dir import Norms, StagingDir

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue
    from .execute import Progress


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """The result of a merge.

    Attributes:
        out: the path of the output, or its uri on a hub.
        plan: the plan that was run.
        norms: a map from each changed tensor to the Frobenius norms of its changes, one norm for each planned update
            of the tensor. Usually, each adapter that changes the tensor has one planned update.
        damage: a map from each weight that was quantized again to the values that `damage_of` returns.
        resumed: the names of the files that an earlier, interrupted run had finished.
        carried: the names of the companion files in the output, which are copies of the base's files. If an adapter's
            tokenizer was chosen, the tokenizer's files are copied from the adapter.
        left_out: the base's files that were not copied, such as weights in other formats or a replaced tokenizer.
        seconds: the time in seconds from the start of planning until the output was flushed to disk.
        already: whether an earlier run wrote the same output from the same inputs, so that nothing was written.
    """

    out: Path | str
    plan: Plan
    norms: Mapping[str, list[float]]
    damage: Mapping[str, Mapping[str, float]]
    resumed: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    already: bool = False

    def __repr__(self) -> str:
        done = ", already done" if self.already else ""
        size = f"{self.plan.bytes:,} bytes"
        return f"Report({str(self.out)!r}: {self.plan.targets:,} targets, {size}, {self.seconds:.2f} s{done})"

    def _repr_html_(self) -> str:
        rows = [[name, *norms] for name, norms in self.norms.items()]
        names = [f"norm of {source.name}'s change" for source in self.plan.sources]
        return html_table(repr(self), ("tensor", *names), rows)

    def record(self) -> dict[str, JsonValue]:
        """Return the report as plain data."""
        return {
            "out": str(self.out), "seconds": round(self.seconds, 3), "bytes": self.plan.bytes,
            "targets": self.plan.targets, "files": [file.name for file in self.plan.files],
            "resumed": list(self.resumed), "carried": list(self.carried), "left_out": list(self.left_out),
            **self.plan.lineage(), "norms": dict(self.norms), **_damaged(self.damage), "already_done": self.already,
        }  # fmt: skip


Engine = Callable[[Plan, StagingDir, "Progress | None"], dict[str, Norms]]
"""A function that writes a plan's weight files into a stage, and returns {file name: norms} for all of them.

It skips the files that an earlier run finished.
"""


def local(device: str) -> Engine:
    """Return an engine that computes on `device`, with threads of this process."""

    def run(plan: Plan, stage: StagingDir, progress: Progress | None) -> dict[str, Norms]:
        from .execute import execute

        return execute(
            plan.files, stage, devices_for(device), progress, plan.workers, link=plan.link, checksums=plan.checksums
        )

    return run


def run_plan(
    plan: Plan, out: Path, engine: Engine, progress: Progress | None, started: float, overwrite: bool,
    *, placed: bool = False,
) -> Report:  # fmt: skip
    """Run a plan and write the output to `out`; see `adapterkit.merge`.

    Args:
        plan: the plan.
        out: the path of the output.
        engine: a function that writes the weight files.
        progress: a function that is called with (bytes done, total bytes).
        started: the value of `time.perf_counter()` when the work began.
        overwrite: whether to replace an existing output.
        placed: whether the weight files at `out` are only sketches (sparse files with a header), because the real files
            are on a hub. If so, disk space is not checked, a finished output is recognised even if `overwrite` is set,
            and the stage is kept after any error.
    """
    begin(f"merging into {out}")
    names = [file.name for file in plan.files]
    one = out.suffix in (".safetensors", ".gguf") and len(names) == 1 and not plan.base.root.is_dir()
    stage = StagingDir(out, plan.digest, names, single=one)
    with stage.locked():
        try:
            decided = _decided(plan)
            if stage.was_completed or ((placed or not overwrite) and stage.is_finished(decided)):
                return _completed(plan, stage, started)
            check_free(out, overwrite)
            resumed = tuple(name for name in names if stage.finished(name))
            if not placed:
                _check_space(plan, out, resumed)
            return _write(plan, stage, engine, progress, started, resumed, decided)
        except NetworkError:
            # Keep the finished files, so that the same command resumes the merge.
            raise
        except (AdapterkitError, OSError, MemoryError):
            # Delete the stage after these errors. After an interrupt, keep it, so that the next run resumes the merge.
            if not placed:
                stage.discard()
            raise


def _decided(plan: Plan) -> str:
    """Return a digest of everything on which the output depends.

    The output depends on the plan, the plan's lineage, the companion files, and whether checksums are recorded.
    """
    copies = plan.companions.copies
    try:
        beside = [[name, *listed([file])] for file, name in copies]
    except OSError as error:
        raise storage_error(error, error.filename or plan.base.root) from error
    return digest_of([plan.digest, plan.lineage(), plan.checksums, beside])


def _completed(plan: Plan, stage: StagingDir, started: float) -> Report:
    """Return a report about the complete output that an earlier run wrote, and delete the stage."""
    record = stage.target / REPORT
    earlier = json.loads(record.read_text()) if record.exists() else kept_result(stage.target)
    previous: dict[str, Any] = dict(earlier)
    resumed = tuple(stage.files) if stage.was_completed else ()
    carried, left_out = _copied(plan)
    stage.discard()
    norms, damage = previous.get("norms", {}), previous.get("damage", {})
    seconds = time.perf_counter() - started
    return Report(stage.target, plan, norms, damage, resumed, carried, left_out, seconds, already=True)


def _copied(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the companion files in the output, and of the base's files that are not copied."""
    if not plan.base.root.is_dir():
        return (), ()
    return tuple(name for _, name in plan.companions.copies), plan.companions.left_out


def _write(
    plan: Plan, stage: StagingDir, engine: Engine, progress: Progress | None, started: float, resumed: tuple[str, ...],
    decided: str,
) -> Report:  # fmt: skip
    norms_by_file = engine(plan, stage, progress)
    norms, damage = _apart(
        plan, {name: values for file in plan.files for name, values in norms_by_file[file.name].items()}
    )
    carried, left_out = _copied(plan)
    if plan.base.root.is_dir():
        _carry(plan, stage.out)
        _write_records(plan, stage, norms, damage)
    stage.publish_all(decided)
    if stage.single:
        # A single file has no report next to it that a later run could read.
        keep_result(stage.target, decided, {"norms": norms, "damage": damage})
    return Report(stage.target, plan, norms, damage, resumed, carried, left_out, time.perf_counter() - started)


def _apart(plan: Plan, norms_found: Norms) -> tuple[Norms, dict[str, dict[str, float]]]:
    """Split the engine's norms into two maps.

    The first map contains the norms of the changes of each tensor. The second map contains the result of `damage_of`
    for each weight that was quantized again.
    """
    norms: Norms = {}
    damage = {}
    for output in plan.outputs():
        if output.name in norms_found:
            values, count = norms_found[output.name], len(output.folds)
            name = output.name if output.part is None else output.part.packed.name
            norms[name] = values[:count]
            if output.part is not None:
                damage[name] = damage_of(values[count:])
    return norms, damage


def _damaged(damage: Mapping[str, Mapping[str, float]]) -> dict[str, JsonValue]:
    return {"damage": dict(damage)} if damage else {}


def _carry(plan: Plan, out: Path) -> None:
    """Copy the companion files into the output."""
    for file, name in plan.companions.copies:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy(file, out / name)
        except OSError as error:
            raise storage_error(error, file) from error


def _copy(file: Path, to: Path) -> None:
    """Copy a file and flush the copy to disk, because the output must be on disk before it is renamed."""
    shutil.copyfile(file, to)
    with open(to, "r+b") as copied:
        os.fsync(copied.fileno())


def _write_records(plan: Plan, stage: StagingDir, norms: Norms, damage: Mapping[str, Mapping[str, float]]) -> None:
    out = stage.out
    before = config_file(plan.base)
    if plan.config_changes and before is not None:
        changed = {**before, **plan.config_changes}
        config = {key: value for key, value in changed.items() if value is not None or key not in plan.config_changes}
        write_bytes(out / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    runs = {file.name: stage.runs_of(file.name) for file in plan.files if file.whole is None}
    written = {name: record_of(spans) for name, spans in runs.items() if spans}
    # A push uses the digest of the base's model card to recognise a copy of this card.
    card = out / CARD
    digest = f"sha256:{hashlib.sha256(card.read_bytes()).hexdigest()}" if card.is_file() else None
    report = {
        **plan.lineage(), "base_card": digest, "norms": norms, **_damaged(damage),
        **({KEY: written} if plan.checksums else {}),
    }  # fmt: skip
    write_bytes(out / REPORT, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
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
            f"the merge needs {needed:,} bytes on disk, but only {free:,} are free",
            path=out.parent,
            cure="Free some space, or write to another disk",
        )
