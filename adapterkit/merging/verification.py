"""Recompute a merge block by block, and compare the result bit by bit with the files on disk."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from threadpoolctl import threadpool_limits

from ..core.arguments import check_count
from ..core.metadata import SHAPES, fingerprints_of, shapes_of
from ..core.tables import html_table
from ..io.checkpoint import PREFIX, Checkpoint, fingerprint
from ..io.lazy import DType, Lazy
from ..io.stages import stage
from ..naming.binding.fitting import merge_record, relation
from ..naming.ties import find_tie, is_embedding
from .arrays import Arrays, NumpyArrays, Workspace
from .checksums import recorded, wrong_runs
from .companions import REPORT
from .options import MergeOptions, most_workers
from .planned import Output
from .planning import make_plan
from .ties import parse_tied

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Adapter
    from ..io.lazy import Array
    from ..io.strict_json import JsonValue
    from .execute import Progress

PIECE = 4 << 20
"""The number of elements that are compared in one step."""

NEAREST = 0.5001
"""An element counts as correctly rounded if its error is at most this many units in the last place."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that differs from the recomputed merge, or a file that differs from its recorded checksums.

    Attributes:
        tensor: the name of the tensor or of the file.
        why: a description of the difference.
        elements: the number of wrong elements; 0 if they were not counted.
        largest: the largest absolute error of an element; 0 if no errors were computed.
    """

    tensor: str
    why: str
    elements: int = 0
    largest: float = 0.0

    def record(self) -> dict[str, JsonValue]:
        return {"tensor": self.tensor, "why": self.why, "elements": self.elements, "largest": self.largest}


@dataclass(frozen=True, slots=True)
class BaseDifference:
    """A difference between two fingerprints: the recorded fingerprint of the base, and the given base's fingerprint.

    Attributes:
        named_by: the source of the recorded fingerprint: the adapter's name, or the file name of the merge's record.
        expected: the recorded fingerprint. If an adapter records several, they are joined by commas.
        given: the fingerprint of the given base.
        how: `same architecture, other weights` or `other names or shapes of tensors`; empty if the shapes of the base's
            tensors were not recorded.
    """

    named_by: str
    expected: str
    given: str
    how: str = ""

    def record(self) -> dict[str, JsonValue]:
        return {"named_by": self.named_by, "expected": self.expected, "given": self.given, "how": self.how}


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a verification.

    Attributes:
        tensors: the number of tensors that were compared with the recomputed merge.
        targets: the number of these tensors that the adapters change.
        differences: the tensors that differ; if checksums were compared, the files that differ.
        files: the number of files that were compared with their recorded checksums.
        base: the recorded fingerprints that differ from the given base's fingerprint.
        warnings: sentences about differences between the given base and the base that an adapter records.
    """

    tensors: int
    targets: int
    differences: tuple[TensorDifference, ...]
    files: int = 0
    base: tuple[BaseDifference, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        outcome = f"{len(self.differences) + len(self.base):,} differences"
        return f"Verification({'ok' if self.ok else outcome}: {self.tensors:,} tensors, {self.targets:,} targets)"

    def _repr_html_(self) -> str:
        records = [one.record() for one in self.differences] + [one.record() for one in self.base]
        keys = list(dict.fromkeys(key for record in records for key in record))
        return html_table(repr(self), keys, [[record.get(key) for key in keys] for record in records])

    @property
    def ok(self) -> bool:
        return not self.differences and not self.base

    def record(self) -> dict[str, JsonValue]:
        records = [difference.record() for difference in self.differences]
        counts = {"tensors": self.tensors, "targets": self.targets} | ({"files": self.files} if self.files else {})
        base = {"base": [difference.record() for difference in self.base]} if self.base else {}
        warnings = {"warnings": list(self.warnings)} if self.warnings else {}
        return {"ok": self.ok, **counts, "differences": records, **base, **warnings}


def compare(
    merged: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[tuple[str, Adapter, float]],
    allow_partial: bool,
    progress: Progress | None,
    seed: int | None = None,
    sample: int | None = None,
    base_differences: Sequence[BaseDifference] = (),
    rename: tuple[str, ...] = (),
) -> Verification:
    """Compare a merged model with the recomputed merge of `adapters` into `base`; see `adapterkit.verify`."""
    stage("comparing every element")
    tied, vocab = recorded_choices(merged, base)
    options = MergeOptions(tied=tied, allow_partial=allow_partial, seed=seed, rename=rename, vocab=vocab)
    plan = make_plan(base, adapters, options)
    recomputed = {output.name for output in plan.outputs()}
    differences = [
        TensorDifference(name, "the recomputed merge does not have this tensor")
        for name in merged.tensors
        if name not in recomputed
    ]
    arrays, done = NumpyArrays(), 0
    outputs = _sampled(list(plan.outputs()), sample)
    total = sum(output.nbytes for output in outputs)

    def check(output: Output) -> TensorDifference | None:
        tensor = merged.tensors.get(output.name)
        with arrays.quiet():
            return TensorDifference(output.name, "missing") if tensor is None else _compare(output, tensor, arrays)

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(plan.workers) as pool:
        for output, difference in zip(outputs, pool.map(check, outputs), strict=True):
            if difference is not None:
                differences.append(difference)
            done += output.nbytes
            if progress is not None:
                progress(done, total)
    targets = sum(bool(output.folds) for output in outputs)
    return Verification(len(outputs), targets, tuple(differences), base=tuple(base_differences))


def check_written(merged: Checkpoint | str | PathLike[str], progress: Progress | None) -> Verification:
    """Compare the files of a merge's output with the checksums in its record; see `adapterkit.verify`."""
    folder = merged.root if isinstance(merged, Checkpoint) else Path(merged)
    written = recorded(folder)
    total = sum(nbytes for runs in written.values() for _, nbytes, _ in runs)
    done, differences = 0, list[TensorDifference]()
    with ThreadPoolExecutor(most_workers()) as pool:
        for (name, runs), reasons in zip(
            written.items(), pool.map(lambda item: wrong_runs(folder / item[0], item[1]), written.items()), strict=True
        ):
            differences += [TensorDifference(name, why) for why in reasons]
            done += sum(nbytes for _, nbytes, _ in runs)
            if progress is not None:
                progress(done, total)
    return Verification(0, 0, tuple(differences), files=len(written))


def compare_bases(
    merged: Checkpoint, base: Checkpoint, adapters: Sequence[tuple[str, Adapter, float]]
) -> list[BaseDifference]:
    """Compare the base's fingerprint with the fingerprints in the merge's record and in the adapters.

    If the fingerprint in the merge's record differs from the base's fingerprint, return a `BaseDifference` for the
    record. If an adapter records fingerprints, and none of these is the base's fingerprint, also return a
    `BaseDifference` for this adapter.
    """
    differences, given = [], fingerprint(base)
    record = merge_record(merged)
    recorded = record.get("base_fingerprint")
    if isinstance(recorded, str) and recorded.startswith(PREFIX) and recorded != given:
        differences.append(BaseDifference(REPORT, recorded, given, relation(base, [str(record.get(SHAPES))])))
    for name, adapter, _ in adapters:
        known = [each for each in fingerprints_of(adapter) if each.startswith(PREFIX)]
        if known and given not in known:
            differences.append(BaseDifference(name, ", ".join(known), given, relation(base, shapes_of(adapter))))
    return differences


def _sampled(outputs: list[Output], sample: int | None) -> list[Output]:
    """Draw `sample` changed and `sample` unchanged tensors at random. If `sample` is None, return all tensors."""
    if sample is None:
        return outputs
    check_count(sample, "sample", "--sample N (sample=N)")
    groups = [[o for o in outputs if not o.copied], [o for o in outputs if o.copied]]
    # Use no seed, so that repeated verifications cover more and more tensors.
    draw = random.SystemRandom().sample
    chosen = {o.name for group in groups for o in draw(group, min(sample, len(group)))}
    return [output for output in outputs if output.name in chosen]


def recorded_choices(merged: Checkpoint, base: Checkpoint) -> tuple[str | None, str | None]:
    """Return the merge's options (`tied`, `vocab`); deduce each from the output's tensors if it is not recorded."""
    return _tied(merged, base), _vocab(merged, base)


def _tied(merged: Checkpoint, base: Checkpoint) -> str | None:
    """Return the merge's option `tied`; deduce it from the names in the output if it is not recorded."""
    record = merge_record(merged)
    if "tied" in record:
        return parse_tied(record["tied"])
    tie = find_tie(base.tensors, base.config)
    return "untie" if tie is not None and tie.head in merged.tensors else "merge"


def _vocab(merged: Checkpoint, base: Checkpoint) -> str | None:
    """Return the merge's option `vocab`; deduce it from the numbers of rows in the output if there is no record."""
    record = merge_record(merged)
    if record:
        return (record.get("vocabulary") or {}).get("choice")
    tables = [name for name in base.tensors if is_embedding(name) and name in merged.tensors]
    grew = any(merged.tensors[name].shape[:1] > base.tensors[name].shape[:1] for name in tables)
    return "grow" if grew else "keep" if tables else None


def _compare(output: Output, tensor: Lazy, arrays: Arrays) -> TensorDifference | None:
    if output.part is not None:
        return _compare_packed(output, tensor, arrays)
    if tensor.shape != output.shape:
        return TensorDifference(output.name, f"the shape is {list(tensor.shape)}, not {list(output.shape)}")
    if tensor.dtype.floating != output.dtype.floating:
        return TensorDifference(output.name, f"the dtype is {tensor.dtype}, not {output.dtype}")
    expected = replace(output, dtype=tensor.dtype)
    return _compare_bytes(expected, tensor) if expected.copied else _compare_blocks(expected, tensor, arrays)


def _compare_packed(output: Output, tensor: Lazy, arrays: Arrays) -> TensorDifference | None:
    """Compare one stored tensor of a packed weight bit by bit."""
    assert output.part is not None
    if (tensor.shape, tensor.dtype) != (output.shape, output.dtype):
        return TensorDifference(
            output.name, f"the tensor is {tensor.dtype} {list(tensor.shape)}, not {output.dtype} {list(output.shape)}"
        )
    import numpy as np

    computed, _ = output.part.compute(Workspace(arrays))
    wanted, there = (np.frombuffer(data, output.dtype.numpy) for data in (computed[output.name], tensor.fetch()))
    bits = f"<u{output.dtype.itemsize}"
    elements = int((wanted.view(bits) != there.view(bits)).sum())
    return TensorDifference(output.name, "it differs from the requantized merge", elements) if elements else None


def _compare_bytes(output: Output, tensor: Lazy) -> TensorDifference | None:
    count = math.prod(tensor.shape)
    for at in range(0, count, PIECE):
        size = min(PIECE, count - at)
        if memoryview(output.source.read(at, size)) != memoryview(tensor.read(at, size)):
            return TensorDifference(output.name, "it differs from the base, although no adapter changes it")
    return None


def _compare_blocks(output: Output, tensor: Lazy, arrays: Arrays) -> TensorDifference | None:
    from .blocks import blocks
    from .compute import BlockMerger

    folder = BlockMerger(output, Workspace(arrays))
    elements, largest = 0, 0.0
    for block in blocks(output):
        expected = bytearray(block.elements * output.dtype.itemsize)
        raw = arrays.over(memoryview(output.source.read(block.first, block.elements)), output.source.dtype)
        folder.compute(raw, arrays.over(memoryview(expected), output.dtype), block)
        there = memoryview(tensor.read(block.first, block.elements))
        if bytes(there) != expected:
            exact = folder.exact(raw, block)
            errors = _errors(
                cast("Array", exact), there, expected, output.dtype, 0 if output.seed is not None else NEAREST
            )
            elements += len(errors)
            largest = max([largest, *errors.tolist()])
    return TensorDifference(output.name, "it differs from the merge", elements, largest) if elements else None


def _errors(exact: Array, there: memoryview, expected: bytearray, dtype: DType, within: float) -> Array:
    """Return the absolute errors of the elements that are not correctly rounded.

    If the exact result is halfway between two values of the dtype, both values count as correct, because the float64
    result of another library may differ in the last bits.
    """
    import ml_dtypes
    import numpy as np

    bits = f"<u{dtype.itemsize}"
    other = np.frombuffer(there, bits) != np.frombuffer(expected, bits)
    values, exact = np.frombuffer(there, dtype.array)[other].astype(float), exact[other]
    info = ml_dtypes.finfo(dtype.array)  # type: ignore[no-untyped-call]
    unit = np.exp2(np.maximum(np.frexp(exact)[1] - 1, info.minexp) - info.nmant)
    errors = np.abs(values - exact)
    # Negate the comparison so that a NaN counts as wrong.
    wrong: Array = errors[~(errors <= within * unit)]
    return np.asarray(np.nan_to_num(wrong, nan=np.inf))
