"""Quantize merged weights again in the base's scheme, and measure how much of the change survives.

A packed weight is a quantized weight, which consists of several stored tensors, such as codes and scales. If a
scheme can pack groups of rows separately, a weight is divided into runs of rows, and several workers merge, pack and
write these runs. Otherwise, one worker computes all stored tensors of the weight together. A packed weight that no
adapter changes is copied, unless the output stores it in another type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..core.adapter import Target
from ..errors import ShapeMismatch, TargetNotFound, Unsupported
from ..io.lazy import BY_TORCH, DTYPES, Lazy
from ..naming.binding import view
from ..native import KINDS, loops
from ..quant import NO_PACKING, STEP, Dequantized, Packed, Rowwise, steps
from .blocks import Block, blocks
from .compute import BlockMerger
from .keeping import directions, kept, swept, weighting
from .planned import BLOCK_ELEMENTS, STEPS, Output, Plan
from .planned_update import factor_bytes

if TYPE_CHECKING:
    from ..io.lazy import Array
    from .arrays import Workspace
    from .planned_update import PlannedUpdate

MAX_WHOLE = 1 << 24
"""A merged weight is kept in memory if it has at most this many elements.

A larger weight is merged again each time that some of its rows are requested.
"""

RUN = 1 << 22
"""Groups of rows are added to a run until the run has this many elements; only a weight's last run may be smaller."""

KEPT_BYTES = 64
"""The memory in bytes that `keep` needs for each element of a weight.

`keep` makes float64 copies of the merged weight, the shifted weight and the packed weight, and float64 arrays of the
differences between these weights.
"""

TEXTS = (
    "--keep adapter (keep='adapter') keeps more of the change with a calibration file: add --calibration builtin, or "
    "pass a file from adapterkit.gating.calibrate (calibration=)"
)
"""The warning if weights are rounded with `keep` but without a calibration file."""

DRAWN = (
    "{}: the base has no tokenizer, so the activations come from random token ids. Activations from texts keep more of "
    "the change: copy the tokenizer's files into the base's folder, and calibrate again"
)
"""The warning if a calibration file has activations of random token ids; `{}` is the file's name."""

SQUARE_BYTES = 48
"""Rounding with activations needs `SQUARE_BYTES * inputs^2` bytes: six float64 matrices `[inputs, inputs]`."""

NORMS = 4
"""The number of norms that `damage` returns. They show how much a weight changes when it is quantized again."""


@dataclass(frozen=True, eq=False)
class RepackedRun:
    """A run: rows of a packed weight that are merged and packed again, or bytes of a packed weight that are copied.

    Attributes:
        places: a map from each stored tensor to (offset of the run's first byte, number of bytes); the last run
            includes the padding at the end of the tensor.
        weight: the packed weight to which the rows or bytes belong.
        groups: the blocks of the run's rows, in groups of adjacent blocks; each group is packed separately. Empty if
            the bytes are copied.
        at: the index of the weight's first planned update among all planned updates of the stored tensor.
        count: the number of planned updates of the stored tensor.
        source: the bytes to copy, if there are no groups.
    """

    places: Mapping[str, tuple[int, int]]
    weight: Repacked
    groups: tuple[tuple[Block, ...], ...] = ()
    at: int = 0
    count: int = 0
    source: Lazy | None = None

    def compute(self, workspace: Workspace, write: Callable[[str, bytes], None]) -> dict[int, float]:
        """Merge and pack the rows; call `write(name, data)` with the bytes of each stored tensor, in file order.

        Returns:
            {index: squared norm}. Norms with an index below `count` measure the changes by the planned updates. The
            next `NORMS` norms come from `damage`.

        Raises:
            Malformed: an element of a factor or of the merged weight is not finite.
        """
        import numpy as np

        packed, output = self.weight.rowwise, self.weight.output
        merger, left = BlockMerger(output, workspace), {name: nbytes for name, (_, nbytes) in self.places.items()}
        # Each norm from `merger.norms()` covers the whole weight, so count it only in the weight's first run.
        counted = merger.norms() if self.groups[0][0].first == 0 else {}
        squares = np.zeros(NORMS)
        for group in self.groups:
            start, stop = self.weight.rows_of(group)
            W = np.ascontiguousarray(packed.rows(start, stop), packed.dtype.array)
            M = np.empty(W.shape, output.dtype.array)
            for block in group:
                first = block.first - group[0].first
                raw, out = (
                    workspace.arrays.over(flat.reshape(-1)[first : first + block.elements].view("u1").data, kind)
                    for flat, kind in ((W, packed.dtype), (M, output.dtype))
                )
                for fold, square in merger.compute(raw, out, block).items():
                    counted[fold] = counted.get(fold, 0.0) + square
            parts = packed.pack_rows(start, M)
            squares += damage(M, W, packed.unpack_rows(start, parts))
            for name, data in parts.items():
                write(name, data)
                left[name] -= len(data)
        for name, count in left.items():
            if count < 0:
                raise ShapeMismatch(f"quantizing again gave {-count} bytes too many", where=name, cure=NO_PACKING)
            if count:
                write(name, bytes(count))
        norms = {self.at + fold: square for fold, square in counted.items()}
        return norms | {self.count + number: float(square) for number, square in enumerate(squares)}


def damage(merged: Array, old: Array, new: Array) -> Array:
    """Return the squared norms of `new - merged`, `merged`, `merged - old` and `new - old` for some rows of a weight.

    Args:
        merged: the merged rows.
        old: the dequantized rows of the base.
        new: the dequantized rows of the output, in the dtype of `old`.
    """
    import numpy as np

    squares, loaded = np.zeros(NORMS), loops()
    kinds = [KINDS.get(BY_TORCH[rows.dtype.name].name) for rows in (merged, old)]
    if loaded is not None and None not in kinds and new.dtype == old.dtype:
        given = [np.ascontiguousarray(rows) for rows in (merged, old, new)]
        loaded.adapterkit_damage(*kinds, *(rows.ctypes.data for rows in given), merged.size, squares.ctypes.data)
        return squares
    M, W, R = (_wide(rows) for rows in (merged, old, new))
    for at, difference in enumerate((R - M, M, M - W, R - W)):
        squares[at] = np.einsum("ij,ij->i", difference, difference).sum(dtype=np.float64)
    return squares


@dataclass(frozen=True, eq=False)
class Repacked:
    """A packed weight that is merged and quantized again.

    Attributes:
        base: the dequantized base.
        packed: the weight as the base stores it.
        folds: the planned updates of the weight.
    """

    base: Dequantized
    packed: Packed
    folds: tuple[PlannedUpdate, ...]

    @cached_property
    def output(self) -> Output:
        """The merged weight as an output tensor, in the dtype that packing expects."""
        packed = self.packed
        return Output(packed.name, DTYPES[packed.merged], packed.shape, 0, packed.lazy(), self.folds)

    @property
    def rowwise(self) -> Rowwise:
        """The packed weight with the methods of `Rowwise`. Use it only if `apart` is true."""
        assert isinstance(self.packed, Rowwise)
        return self.packed

    @property
    def apart(self) -> bool:
        """Whether the weight is computed in separate runs of rows instead of as a whole."""
        return isinstance(self.packed, Rowwise) and self.packed.apart and not self.keeps

    @property
    def keeps(self) -> bool:
        """Whether the option `keep` is set and applies to this weight.

        The option applies to a changed weight with at least two axes, if `pack` expects float32 values. If `pack`
        expects another dtype, such as float16, packing is only a cast, and the option does not apply.
        """
        packed = self.packed
        return self.base.keep is not None and bool(self.folds) and len(packed.shape) > 1 and packed.merged == "F32"

    @property
    def memory(self) -> int:
        """The memory in bytes that computing the packed weight needs."""
        return self._memory_by_rows if self.apart else self._memory_whole

    @property
    def _memory_by_rows(self) -> int:
        """Memory in bytes: copies of the largest group of rows, float64 copies of a block, and the updates' factors."""
        width, count = self.packed.shape[-1], math.prod(self.packed.shape)
        block = max(BLOCK_ELEMENTS, width) if all(fold.blockable for fold in self.folds) else count
        group = max((sum(block.elements for block in group) for group in self._groups()), default=0)
        images = 1 if all(fold.additive for fold in self.folds) else 1 + STEPS
        return 16 * group + 8 * images * min(block, count) + factor_bytes(self.folds)

    def runs(self) -> tuple[RepackedRun, ...] | None:
        """Return the weight's runs. For each stored tensor that does not change, one run copies the tensor's bytes.

        Return None if all stored tensors are computed together.
        """
        if not self.apart:
            return None
        stored = self.base.stored.tensors
        ends = {name: self._written(name).nbytes for name in self.rowwise.places(0)}
        kept = (RepackedRun({name: (0, stored[name].nbytes)}, self, source=stored[name])
                for name in self.packed.members if name not in ends)  # fmt: skip
        return (*self.runs_between(dict.fromkeys(ends, 0), ends, 0, len(self.folds)), *kept)

    def runs_between(
        self, starts: Mapping[str, int], ends: Mapping[str, int], at: int, count: int
    ) -> Iterator[RepackedRun]:
        """Yield the runs of rows.

        `starts` and `ends` map each stored tensor to the offsets at which the weight's bytes begin and end. `at` and
        `count` are the attributes of `RepackedRun`.
        """
        run: list[tuple[Block, ...]] = []
        total, width = math.prod(self.packed.shape[:-1]), self.packed.shape[-1]
        for group in self._groups():
            run.append(group)
            first, stop = self.rows_of(run[0])[0], self.rows_of(group)[1]
            if stop == total or (stop - first) * width >= RUN:
                begins, stops = self.rowwise.places(first), self.rowwise.places(stop)
                places = {}
                for name, start in starts.items():
                    end = ends[name] if stop == total else start + stops[name]
                    places[name] = (start + begins[name], end - start - begins[name])
                yield RepackedRun(places, self, tuple(run), at, count)
                run = []

    def _groups(self) -> Iterator[tuple[Block, ...]]:
        """Yield the weight's blocks in the smallest groups that can be packed separately."""
        group: list[Block] = []
        for block in blocks(self.output):
            group.append(block)
            if self.rowwise.closed(self.rows_of((block,))[1]):
                yield tuple(group)
                group = []

    def rows_of(self, group: Sequence[Block]) -> tuple[int, int]:
        """Return (first row, row after the last) of consecutive blocks, as row numbers of the packed weight."""
        # Compute the row numbers from offsets in elements, because a block's own row numbers may differ from those of
        # the packed weight. In a stack of experts, a block counts rows from the first row of its expert. In a
        # convolution, a row of a block contains all kernel positions.
        width, last = self.packed.shape[-1], group[-1]
        return group[0].first // width, (last.first + last.elements) // width

    @property
    def _memory_whole(self) -> int:
        """Memory in bytes: the old stored tensors, two copies of the new ones, the merged weight, temporary arrays."""
        stored = sum(self.base.stored.tensors[name].nbytes for name in self.packed.members)
        count = math.prod(self.packed.shape)
        if self.keeps:
            square = 0 if self.base.calibration is None else SQUARE_BYTES * self.packed.shape[-1] ** 2
            return 3 * stored + KEPT_BYTES * count + square + factor_bytes(self.folds)
        return 3 * stored + 4 * min(count, MAX_WHOLE) + 32 * STEP

    def compute(self, workspace: Workspace) -> tuple[dict[str, bytes], dict[int, float]]:
        """Return the bytes of every stored tensor, and {index: squared norm}.

        The first norms measure the changes by the planned updates. The next `NORMS` norms come from `damage`.

        Raises:
            Malformed: an element of a factor or of the merged weight is not finite.
            Unsupported: the scheme cannot quantize.
        """
        merged = _Merged(self.output, workspace)
        parts, again = self._packed(self._keeping(merged) if self.keeps else merged.rows)
        squares = self._damage(merged, again)
        norms = merged.norms | {len(self.folds) + at: square for at, square in enumerate(squares)}
        stored = self.base.stored.tensors
        kept = {name: bytes(stored[name].fetch()) for name in self.packed.members if name not in parts}
        return parts | kept, norms

    def _packed(self, rows: Callable[[int, int], Array]) -> tuple[dict[str, bytes], Packed]:
        """Quantize rows; return the bytes of the stored tensors that change, and the new packed weight."""
        packed_rows = self.packed.pack(rows)
        parts = {name: self._bytes(name, array) for name, array in packed_rows.items()}
        return parts, self.base.unpacked_again(
            self.packed, {name: self._lazy(name, data) for name, data in parts.items()}
        )

    def _keeping(self, merged: _Merged) -> Callable[[int, int], Array]:
        """Adjust the merged weight, so that it keeps the adapter's change when it is packed; see `keeping`.

        Return a function (start, stop) -> rows of the adjusted weight.
        """
        import numpy as np

        from ..ops.resizing import seed_of

        count = math.prod(self.packed.shape[:-1])
        target = self.folds[0].target
        M, W = (self._matrices(rows, target) for rows in (merged.rows(0, count), self.packed.rows(0, count)))
        directions_found = [
            directions(m.astype(np.float64) - w, seed_of(f"{target}:{e}"))
            for e, (m, w) in enumerate(zip(M, W, strict=True))
        ]
        inputs = self.inputs
        if inputs is not None and len(M) == 1 and inputs.shape[1] == M.shape[2]:
            flat = self._rows(self._swept(M[0], inputs, directions_found[0])[None], target)
            return lambda start, stop: flat[start:stop]
        most = max(len(each) for each in directions_found)
        if not most:
            return merged.rows
        Vh = np.stack([np.pad(each, ((0, most - len(each)), (0, 0))) for each in directions_found])

        def trip(matrices: Array) -> Array:
            flat = self._rows(matrices, target)
            return self._matrices(self._packed(lambda start, stop: flat[start:stop])[1].rows(0, count), target)

        flat = self._rows(kept(trip, M, Vh), target)
        return lambda start, stop: flat[start:stop]

    def _swept(self, M: Array, inputs: Array, directions: Array) -> Array:
        """Return the matrix to pack instead of M, as `keeping.swept` computes it.

        Packing changes the layer's outputs for the calibration's activations. If the returned matrix is packed, these
        outputs change less than if M is packed.
        """
        target, count = self.folds[0].target, math.prod(self.packed.shape[:-1])

        def trip(matrix: Array) -> Array:
            flat = self._rows(matrix[None], target)
            again = self._packed(lambda start, stop: flat[start:stop])[1].rows(0, count)
            whole: Array = self._matrices(again, target)[0]
            return whole

        return swept(trip, M, weighting(inputs, directions))

    @property
    def inputs(self) -> Array | None:
        """The calibration's activations for this weight, `[tokens, inputs]`; None if the calibration has none."""
        if self.base.calibration is None:
            return None
        inputs = (self.base.calibration.inputs(fold.target.path) for fold in self.folds)
        return next((each for each in inputs if each is not None), None)

    def _matrices(self, rows: Array, target: Target) -> Array:
        """Convert all rows of the weight to float32 in the shape `[experts, outputs, inputs]`.

        If the weight has no experts, the first axis has the size 1.
        """
        whole = rows.astype("f4").reshape(self.packed.shape)
        stacked = target.stacked and whole.ndim > 2
        seen = view(whole, self._whole_target(target, stacked))
        return seen.reshape(*seen.shape[:2], -1) if stacked else seen.reshape(1, len(seen), -1)

    def _rows(self, matrices: Array, target: Target) -> Array:
        """Invert `_matrices`: convert `matrices`, of shape `[experts, outputs, inputs]`, to the rows of the weight."""
        import numpy as np

        stacked = target.stacked and len(self.packed.shape) > 2
        whole = self._whole_target(target, stacked)
        # `view` swaps two axes, so applying it twice restores the stored order.
        form = view(np.broadcast_to(np.float32(0), self.packed.shape), whole).shape
        back = view(matrices.reshape(form), whole)
        rows: Array = np.ascontiguousarray(back)
        return rows.reshape(-1, rows.shape[-1])

    @staticmethod
    def _whole_target(target: Target, stacked: bool) -> Target:
        return Target(target.path, target.layout if stacked else target.layout.removeprefix("e "))

    def _bytes(self, name: str, array: Array) -> bytes:
        import numpy as np

        data, wanted = np.ascontiguousarray(array).tobytes(), self._written(name).nbytes
        if len(data) != wanted:
            raise ShapeMismatch(f"quantizing again gave {len(data)} bytes, not {wanted}", where=name, cure=NO_PACKING)
        return data

    def _written(self, name: str) -> Lazy:
        if self.packed.share is not None:
            return self.packed.share
        return self.packed.written if self.packed.changes else self.base.stored.tensors[name]

    def _lazy(self, name: str, data: bytes) -> Lazy:
        form = self._written(name)
        return Lazy(form.shape, form.dtype, lambda: data)

    def _damage(self, merged: _Merged, again: Packed) -> list[float]:
        import numpy as np

        squares = np.zeros(NORMS)
        for start, stop in steps(self.packed.shape):
            squares += damage(*(rows(start, stop) for rows in (merged.rows, self.packed.rows, again.rows)))
        return [float(square) for square in squares]


def _wide(rows: Array) -> Array:
    """Return float32 and float64 arrays unchanged, and convert all other arrays to float32."""
    return rows if rows.dtype.itemsize >= 4 and rows.dtype.kind == "f" else rows.astype("f4")


@dataclass(frozen=True, eq=False)
class RepackedStack:
    """Consecutive packed weights in one stored tensor, such as the experts of a layer; some may be unchanged."""

    weights: tuple[Repacked, ...]

    @property
    def packed(self) -> Packed:
        """The stack's first weight, renamed to the name of the stored tensor; it represents the whole stack."""
        first = self.weights[0].packed
        return replace(first, name=first.members[0])

    @property
    def folds(self) -> tuple[PlannedUpdate, ...]:
        return tuple(fold for weight in self.weights for fold in weight.folds)

    @property
    def memory(self) -> int:
        changed = [weight for weight in self.weights if weight.folds or weight.packed.changes]
        largest = max((weight.memory for weight in changed), default=0)
        return largest if all(weight.apart for weight in changed) else 2 * self.packed.written.nbytes + largest

    def runs(self) -> tuple[RepackedRun, ...] | None:
        """Return the runs of all weights. For each unchanged weight, one run copies the weight's bytes.

        Return None if a changed weight cannot be computed in runs.
        """
        changed = [weight for weight in self.weights if weight.folds or weight.packed.changes]
        return tuple(self._runs()) if all(weight.apart for weight in changed) else None

    def _runs(self) -> Iterator[RepackedRun]:
        offset = at = 0
        for number, weight in enumerate(self.weights, 1):
            assert weight.packed.share is not None
            member, nbytes = self.packed.name, weight.packed.share.nbytes
            # Include padding, which the stored tensor may have after its last weight.
            end = self.packed.written.nbytes if number == len(self.weights) else offset + nbytes
            if weight.folds or weight.packed.changes:
                yield from weight.runs_between({member: offset}, {member: end}, at, len(self.folds))
            else:
                yield RepackedRun({member: (offset, nbytes)}, weight, source=weight.packed.share)
            offset, at = offset + nbytes, at + len(weight.folds)

    def compute(self, workspace: Workspace) -> tuple[dict[str, bytes], dict[int, float]]:
        """Return the bytes of the stored tensor, and {index: squared norm}, as `Repacked.compute` does.

        The squared norms from `damage` are summed over all weights that are quantized again.
        """
        member, data, norms, squares = self.packed.name, bytearray(), dict[int, float](), [0.0] * NORMS
        at = 0
        for weight in self.weights:
            if not weight.folds and not weight.packed.changes:
                data += weight.packed.share.fetch()  # type: ignore[union-attr]
                continue
            parts, squares_found = weight.compute(workspace)
            data += parts[member]
            count = len(weight.folds)
            norms |= {at + fold: square for fold, square in squares_found.items() if fold < count}
            squares = [square + squares_found[count + number] for number, square in enumerate(squares)]
            at += count
        # Add padding, which the stored tensor may have after its last weight.
        data += bytes(self.packed.written.nbytes - len(data))
        return {member: bytes(data)}, norms | {at + number: square for number, square in enumerate(squares)}


class _Merged:
    """A merged weight in the dtype that packing expects. Its rows can be requested in any order."""

    def __init__(self, output: Output, workspace: Workspace) -> None:
        self.output = output
        self.workspace, self.arrays = workspace, workspace.arrays
        self.folder = BlockMerger(self.output, workspace)
        self.norms = self.folder.norms()
        self._seen: set[int] = set()
        self._last: tuple[Block, Array] | None = None
        self._width = output.shape[-1]

    def rows(self, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` of the weight in the shape `[rows, width]`."""
        import numpy as np

        if self._whole is not None:
            return self._whole[start * self._width : stop * self._width].reshape(-1, self._width)
        first, end = start * self._width, stop * self._width
        block_rows = np.empty(end - first, self.output.dtype.array)
        for block in self._blocks:
            low, high = max(first, block.first), min(end, block.first + block.elements)
            if low < high:
                block_rows[low - first : high - first] = self._block(block)[low - block.first : high - block.first]
        return block_rows.reshape(-1, self._width)

    @cached_property
    def _blocks(self) -> list[Block]:
        return blocks(self.output)

    @cached_property
    def _whole(self) -> Array | None:
        # Keep the merged weight in memory if it is small enough, because all rows are requested at least twice: to pack
        # them, and to measure the damage.
        count = math.prod(self.output.shape)
        if count > MAX_WHOLE:
            return None
        whole = self.workspace.keep(count, self.output.dtype)
        for block in self._blocks:
            self._merge(block, whole[block.first : block.first + block.elements])
        return whole

    def _block(self, block: Block) -> Array:
        import numpy as np

        if self._last is None or self._last[0] is not block:
            out = np.empty(block.elements, self.output.dtype.array)
            self._merge(block, out)
            self._last = (block, out)
        return self._last[1]

    def _merge(self, block: Block, out: Array) -> None:
        """Merge a block of the weight, and write the result to the numpy array `out`."""
        source = self.output.source
        raw = self.arrays.over(memoryview(bytearray(source.read(block.first, block.elements))), source.dtype)
        target = self.arrays.over(out.view("u1").data, self.output.dtype)
        for fold, square in self.folder.compute(raw, target, block).items():
            if (
                block.first not in self._seen
            ):  # Count each block's norms once, because blocks of a large weight are merged repeatedly.
                self.norms[fold] = self.norms.get(fold, 0.0) + square
        self._seen.add(block.first)


def repacked(
    base: Dequantized, names: Mapping[str, str], folds: Mapping[str, tuple[PlannedUpdate, ...]]
) -> tuple[dict[str, Lazy], dict[str, tuple[PlannedUpdate, ...]], dict[str, Repacked | RepackedStack], frozenset[str]]:
    """Return the maps from which a plan is made. They list a packed weight's stored tensors, not the weight itself.

    Args:
        base: the dequantized base.
        names: a map from output tensors to the base's tensors.
        folds: a map from tensors to planned updates, in which each packed weight is one tensor.

    Returns:
        Four values. The first value maps names of output tensors to source tensors. The second value maps names of
        output tensors to planned updates; the updates of a packed weight are listed under its first stored tensor. The
        third value maps names of output tensors to the packed weights that are quantized again. The fourth value is the
        set of the names of all stored tensors of packed weights. No option casts these tensors to another dtype.

    Raises:
        Unsupported: a packed weight would have to be written twice, or adapterkit cannot quantize to the base's scheme.
    """
    twice = next((name for name, source in names.items() if name != source and source in base.packed), None)
    if twice is not None:
        why = f"the output would store the packed weight {names[twice]} a second time, which is not implemented"
        cure = "Choose --tied merge (tied='merge'), or --quantized dequantize (quantized='dequantize')"
        raise Unsupported(why, where=twice, cure=cure)
    stored = base.written
    tensors = stored | {n: stored[s] for n, s in names.items() if s not in base.packed}
    moved: dict[str, tuple[PlannedUpdate, ...]] = {}
    parts: dict[str, Repacked | RepackedStack] = {}
    stacks: dict[str, list[Repacked]] = {}
    for shared in (weight for weight in base.packed.values() if weight.share is not None):
        stacks.setdefault(shared.members[0], []).append(Repacked(base, shared, folds.get(shared.name, ())))
    for name, group in folds.items():
        weight = base.packed.get(name)
        if weight is not None and type(weight).pack is Packed.pack:
            raise Unsupported(f"adapterkit cannot quantize to {base.scheme}", where=name, cure=NO_PACKING)
        if weight is not None and weight.share is not None:
            continue
        moved[name if weight is None else weight.members[0]] = group
        if weight is not None:
            parts |= dict.fromkeys(weight.members, Repacked(base, weight, group))
    for weight in base.packed.values():
        if weight.changes and weight.share is None and weight.members[0] not in parts:
            parts |= dict.fromkeys(weight.members, Repacked(base, weight, ()))
    for member, weights in stacks.items():
        stack = RepackedStack(tuple(weights))
        if stack.folds:
            moved[member] = stack.folds
        if stack.folds or stack.packed.changes:
            parts[member] = stack
    members = frozenset(member for weight in base.packed.values() for member in weight.members)
    return tensors, moved, parts, members


def uncalibrated(plan: Plan) -> tuple[str, ...]:
    """Return warnings if `keep` rounds weights without activations, or with activations of random token ids.

    Raises:
        TargetNotFound: the calibration has no activations for any target.
        ShapeMismatch: the calibration's activations for a target do not have as many inputs as the target.
    """
    base = plan.base
    if not isinstance(base, Dequantized) or base.keep is None:
        return ()
    rounded = (output for output in plan.outputs() if output.part is not None)
    folds = [fold for output in rounded for fold in output.folds if not fold.bias]
    changed = {fold.target.path for fold in folds}
    if base.calibration is None:
        return (TEXTS,) if changed else ()
    known, calibration = set(base.calibration.shared), base.calibration
    lacking = sorted(changed - known)
    if changed and len(lacking) == len(changed):
        why = "the calibration has no activations for any target of the adapters"
        cure = "Run adapterkit.gating.calibrate on this base with these adapters"
        raise TargetNotFound(why, path=calibration.path, where=lacking[0], cure=cure)
    for fold in folds:
        width, wanted = base.calibration.width(fold.target.path), math.prod(fold.logical[1:])
        if width is not None and width != wanted:
            why = f"the calibration's activations are for {width} inputs, but the weight has {wanted} inputs"
            cure = "Run adapterkit.gating.calibrate on this base with these adapters"
            raise ShapeMismatch(why, path=calibration.path, where=fold.target.path, cure=cure)
    warnings = []
    if calibration.drawn:
        warnings.append(DRAWN.format(calibration.path.name))
    if lacking:
        names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        count = f"{len(lacking)} of {len(changed)} targets ({names})"
        name = calibration.path.name
        warnings.append(
            f"{name} has no activations for {count}. These targets are rounded as with --keep adapter alone, without "
            "activations"
        )
    return tuple(warnings)


def damage_of(norms: list[float]) -> dict[str, float]:
    """Return how much a weight lost when it was quantized again, as the numbers `error` and `kept`.

    `error` is the rounding error relative to the merged weight. `kept` tells how much of the change survived. It is the
    projection of the actual change on the intended change, divided by the norm of the intended change. It is 1 if the
    whole change survived, and 0 if nothing did.

    Args:
        norms: the four norms of the whole weight. Each is the square root of a squared norm from `damage`, summed over
            all rows.
    """
    error, merged, change, left = norms
    # R, M and W are the new, the merged and the old weight. |R - M|^2 = |R - W|^2 + |M - W|^2 - 2 <R - W, M - W>. So
    # the norms alone determine the projection of R - W on M - W, and the weights need not be kept in memory.
    kept = (left**2 + change**2 - error**2) / (2 * change**2) if change else 1.0
    return {"error": error / merged if merged else 0.0, "kept": kept}
