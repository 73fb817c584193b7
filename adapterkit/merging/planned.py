"""The plan of a merge: the output files, their tensors, and the updates of each tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from .. import __version__
from ..core.arguments import checks_types
from ..core.metadata import SHAPES
from ..core.tables import html_table
from ..io.checkpoint import Checkpoint
from ..io.direct import BUFFERED
from ..io.lazy import DType, Lazy, Shape
from .companions import Companions
from .options import workers_within
from .planned_update import PlannedUpdate, factor_bytes
from .planned_updates import AdapterSource
from .quantized import quantized_record

if TYPE_CHECKING:
    from ..core.licence_terms import Licence
    from ..io.strict_json import JsonValue
    from ..quant import Packed
    from .arrays import Workspace

BLOCK_ELEMENTS = 3 << 17
"""The number of elements in a block. A block's float64 copy (3 MB) stays in a processor core's cache."""

STEPS = 4
"""A formula needs at most this many temporary arrays in addition to the block. Each array is as large as the block."""


class PackedRun(Protocol):
    """A part of a packed weight that one worker computes or copies: consecutive bytes of each stored tensor."""

    @property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """A map from each stored tensor to (offset of the first byte, number of bytes)."""
        ...

    @property
    def source(self) -> Lazy | None:
        """The bytes to copy; None if they are computed."""
        ...

    def compute(self, workspace: Workspace, write: Callable[[str, bytes], None]) -> dict[int, float]:
        """Compute the run's bytes, and pass them to `write(tensor_name, data)`.

        Each stored tensor's bytes are passed from first to last, in one or more calls.

        Returns:
            {index: squared norm}. The first indices are those of the planned updates. The next indices are those of the
            norms from `requantize.damage`.
        """
        ...


class PackedPart(Protocol):
    """A packed weight, or several packed weights in one stored tensor, to be merged and quantized again."""

    @property
    def packed(self) -> Packed:
        """The packed weight. If the part has several, this is the first one, renamed to the stored tensor's name."""
        ...

    @property
    def folds(self) -> tuple[PlannedUpdate, ...]:
        """The planned updates of all weights of the part."""
        ...

    @property
    def memory(self) -> int:
        """The memory in bytes that the computation needs."""
        ...

    def runs(self) -> Sequence[PackedRun] | None:
        """Return the part as runs that can be computed separately; None if it must be computed as a whole."""
        ...

    def compute(self, workspace: Workspace) -> tuple[dict[str, bytes], dict[int, float]]:
        """Return {name of a stored tensor: its bytes}, and the squared norms in the form of `PackedRun.compute`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One tensor of the output: its source, its planned updates, and the offset of its data in the file.

    A tensor with a `part` belongs to a packed weight that is quantized again; all tensors of the weight are computed
    together.
    """

    name: str
    dtype: DType
    shape: Shape
    offset: int
    source: Lazy
    folds: tuple[PlannedUpdate, ...]
    part: PackedPart | None = None
    seed: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copied(self) -> bool:
        """Whether the tensor's bytes are copied from the base."""
        return not self.folds and self.part is None and self.dtype == self.source.dtype


@dataclass(frozen=True, slots=True, eq=False)
class OutputFile:
    """One weight file of the output. `whole` is the base's file if the output file is a copy of it, else None."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]
    whole: Path | None = None

    @property
    def size(self) -> int:
        return max((output.offset + output.nbytes for output in self.outputs), default=len(self.header))

    @property
    def computed(self) -> int:
        """Number of bytes that are computed rather than copied."""
        return sum(output.nbytes for output in self.outputs if not output.copied)

    def record(self) -> dict[str, JsonValue]:
        targets = sum(bool(output.folds) for output in self.outputs)
        copied = self.size - self.computed
        return {
            "name": self.name, "bytes": self.size, "copied_bytes": copied, "computed_bytes": self.computed,
            "tensors": len(self.outputs), "targets": targets,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The plan of a merge, made before any weight is read.

    Attributes:
        base: the open base.
        sources: the adapters, bound to the base.
        files: the weight files of the output.
        tied: the choice for tied weights, see `parse_tied`; None if the adapters' files decide.
        config_changes: a map from keys of `config.json` to new values; a value None removes the key.
        dtype: the dtype to which all floating-point tensors are cast, or None.
        seed: the seed for stochastic rounding; None rounds to nearest.
        memory: the largest amount of memory to use, in bytes, not counting the memory of the imported libraries.
        link: whether the output contains hard links to unchanged files of the base instead of copies.
        origin: the uri of the base if it came from a hub. It is stored here because the downloaded folder may be
            deleted before the report is made.
        checksums: whether checksums of the written bytes are recorded.
        warnings: the warnings for the user, each a sentence.
        companions: the files to copy next to the weights.
        fingerprint: the fingerprint of the base's weights, see `io/checkpoint.py`; None if it was not computed.
        shapes: a digest of the names and shapes of the base's tensors; None if it was not computed.
        licences: the known licences of the base and the adapters, keyed by the names that messages use.
        vocabulary: plain data about a changed vocabulary; None if the base's vocabulary is kept.
    """

    base: Checkpoint
    sources: tuple[AdapterSource, ...]
    files: tuple[OutputFile, ...]
    tied: str | None
    config_changes: Mapping[str, JsonValue] = field(default_factory=dict)
    dtype: DType | None = None
    seed: int | None = None
    memory: int = 1 << 62
    link: bool = False
    origin: str | None = None
    checksums: bool = False
    warnings: tuple[str, ...] = ()
    companions: Companions = field(default_factory=Companions)
    fingerprint: str | None = None
    shapes: str | None = None
    licences: Mapping[str, Licence] = field(default_factory=dict)
    vocabulary: Mapping[str, JsonValue] | None = None
    _cached_memory: tuple[int, str] | None = field(default=None, init=False)

    def __repr__(self) -> str:
        names = ", ".join(source.name for source in self.sources)
        files = f"{self.bytes:,} bytes in {len(self.files):,} files"
        return f"Plan({names} into {str(self.base.root)!r}: {self.targets:,} targets, {files})"

    def _repr_html_(self) -> str:
        rows = [[file.name, file.size, sum(bool(o.folds) for o in file.outputs)] for file in self.files]
        return html_table(repr(self), ("file", "bytes", "targets"), rows)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def targets(self) -> int:
        return sum(bool(output.folds) for output in self.outputs())

    def outputs(self) -> Iterator[Output]:
        """Return all output tensors, in the order of the files."""
        return (output for file in self.files for output in file.outputs)

    @property
    def digest(self) -> str:
        """A sha256 of everything on which the output depends: base, adapters, options, version of the library."""
        # Use the sizes and modification times of files, because hashing their contents would read the whole base.
        stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in self.base.files]
        headers = [hashlib.sha256(file.header).hexdigest() for file in self.files]
        head = [
            __version__,
            stamps,
            headers,
            [file.name for file in self.files],
            self.tied,
            dict(self.config_changes),
            self.seed,
            # Include how weights are rounded: no header shows it, and a resumed run must round like the earlier run.
            quantized_record(self.base),
        ]
        text = json.dumps([*head, [source.record() for source in self.sources]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def peak_memory(self) -> int:
        """The memory in bytes that all workers need together for blocks, float64 copies, factors and write buffers."""
        return self._largest[0] * self.workers

    @property
    def workers(self) -> int:
        """The number of computing threads: `most_workers()`, or fewer if `memory` is not enough for so many.

        Raises:
            StorageError: the memory is too small for one thread.
        """
        return workers_within(self.memory, *self._largest)

    @property
    def _largest(self) -> tuple[int, str]:
        if self._cached_memory is None:
            known: dict[Hashable, int] = {}
            computed = [
                (BUFFERED + _memory_of(output, known), output.name) for output in self.outputs() if not output.copied
            ]
            # Cache the value, because a mixture of experts may have 45,000 outputs. The dataclass is frozen, so a plain
            # assignment would raise an error.
            object.__setattr__(self, "_cached_memory", max(computed, default=(0, "")))
        return cast("tuple[int, str]", self._cached_memory)

    @checks_types
    def lineage(self, digests: bool = True) -> dict[str, JsonValue]:
        """Return the record of how the output was made, which is stored in the output.

        The record has no paths and no times, so that equal merges write equal bytes.

        Args:
            digests: whether to include the adapters' digests; computing them reads all tensors of the adapters.
        """
        return {
            **({} if self.origin is None else {"base_uri": self.origin}),
            "adapterkit": __version__, "adapters": [source.record(digests) for source in self.sources],
            "dtype": None if self.dtype is None else self.dtype.name, "seed": self.seed, "tied": self.tied,
            "quantized": quantized_record(self.base), "warnings": list(self.warnings),
            "base_fingerprint": self.fingerprint, "tokenizer": self.companions.tokenizer,
            **({} if self.shapes is None else {SHAPES: self.shapes}),
            **({} if self.vocabulary is None else {"vocabulary": dict(self.vocabulary)}),
            **({} if not self.licences else {"licences": {k: dict(v) for k, v in self.licences.items()}}),
        }  # fmt: skip

    @checks_types
    def record(self, digests: bool = True) -> dict[str, JsonValue]:
        """Return the plan as plain data.

        Args:
            digests: whether to include the digests of the plan and of the adapters; computing them reads all tensors of
                the adapters. If False, the digests are null.
        """
        return {
            "base": str(self.base.root), "digest": self.digest if digests else None, "bytes": self.bytes,
            "targets": self.targets,
            "peak_memory": self.peak_memory, "memory": self.memory, "workers": self.workers,
            "files": [file.record() for file in self.files], **self.lineage(digests),
        }  # fmt: skip


def _memory_of(output: Output, known: dict[Hashable, int]) -> int:
    """Return the memory in bytes that one worker needs for an output.

    `known` caches the results. Outputs with equal shapes and dtypes share a result if their updates have the same
    `form`s, layouts and `bias` flags.
    """
    if output.part is not None:
        return output.part.memory
    folds = [(fold.target.layout, fold.bias, tuple([update.form for update in fold.updates])) for fold in output.folds]
    form = output.shape, output.dtype.name, output.source.dtype.name, tuple(folds)
    if form not in known:
        known[form] = _block_bytes(output)
    return known[form]


def _block_bytes(output: Output) -> int:
    elements = math.prod(output.shape)
    if all(fold.blockable for fold in output.folds):
        elements = min(elements, max(BLOCK_ELEMENTS, elements // max(output.shape[0] if output.shape else 1, 1)))
    images = 1 if all(fold.additive for fold in output.folds) else 1 + STEPS
    return elements * (8 * images + output.dtype.itemsize + output.source.dtype.itemsize) + factor_bytes(output.folds)
