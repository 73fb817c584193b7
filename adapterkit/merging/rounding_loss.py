"""Compute a LoRA that corrects the rounding errors of a quantized merge.

The LoRA is loaded together with the merged model.

Quantizing a merged weight again may lose most of a change that is small compared to a quantization step. The rounding
error resembles the lost change, so a LoRA of small rank can represent a large part of the error. LQER
(Zhang et al. 2024, https://arxiv.org/abs/2402.02446) corrects the rounding errors of a whole model in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, BaseRef, Step, Target
from ..errors import UsageError
from ..io.computed import load
from ..io.stages import stage
from ..naming.binding import view
from ..naming.binding.fitting import identity_of
from ..ops.differences import frobenius, left
from ..ops.lowering import Change, balanced, low_rank, result_type
from ..ops.prefetch import ahead, most_workers, one_blas_thread
from ..quant import Dequantized, dequantized
from .arrays import NumpyArrays, Workspace
from .blocks import blocks
from .compute import BlockMerger
from .options import MergeOptions
from .planned import Output
from .planning import make_plan
from .verification import recorded_choices

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Array, DType
    from ..io.strict_json import JsonValue
    from ..ops.resizing import Cut, Report
    from ..ops.sketching import Criterion
    from .execute import Progress


def remainder_of(
    merged: Checkpoint,
    base: Dequantized,
    adapters: Sequence[tuple[str, Adapter, float]],
    rank: int,
    *,
    allow_partial: bool = False,
    rename: tuple[str, ...] = (),
    dtype: str | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Return a LoRA that corrects the rounding errors of a quantized merge; see `adapterkit.merging.remainder`.

    Args:
        merged: the output of the merge, with quantized weights.
        base: the dequantized base of the merge.
        adapters: a tuple (name, adapter, weight) for each adapter of the merge.
        rank: the rank of the returned LoRA.
        allow_partial: whether to skip targets that the base does not have, as in the merge.
        rename: the rules of the merge's option `rename`, which map names in the adapters to names in the base.
        dtype: the dtype of the LoRA's factors.
        report: a function that is called with a `Cut` for each weight.
        progress: a function that is called with (bytes done, total bytes).
    """
    from ..ops.sketching import Criterion

    stage("decomposing the rounding errors")
    stored = dequantized(merged)
    tied, vocab = recorded_choices(merged, base)
    options = MergeOptions(dtype="f32", tied=tied, allow_partial=allow_partial, rename=rename, vocab=vocab)
    outputs = make_plan(base, adapters, options).outputs()
    changed = [output for output in outputs if output.folds and output.name in stored.packed]
    if not changed:
        cure = "Omit --remainder, or do not call remainder(): no change was rounded, so there is nothing to correct"
        raise UsageError("no adapter changes a packed weight", path=merged.root, cure=cure)
    criterion = Criterion(rank)
    criterion.check()
    criterion.check_possible(max(min(_sides(output)) for output in changed))
    kind = result_type([], dtype)
    updates: dict[Target, tuple[Update, ...]] = {}
    done, whole = 0, sum(output.nbytes for output in changed)
    with (
        one_blas_thread(),
        ahead(lambda output: _lost(output, stored, criterion, kind), changed, most_workers()) as results,
    ):
        for output, (target, lora, cut) in zip(changed, results, strict=True):
            updates[target] = (lora,)
            if report is not None:
                report(cut)
            done += output.nbytes
            if progress is not None:
                progress(done, whole)
    names: list[JsonValue] = [name for name, _, _ in adapters]
    step = Step("remainder", {"rank": rank, "of": names, **identity_of(merged)})
    return Adapter(updates, BaseRef(id=merged.root.name), (step,))


def _sides(output: Output) -> tuple[int, int]:
    """Return (outputs, inputs times kernel positions) of one weight."""
    out, *rest = output.folds[0].logical if output.folds[0].target.rows is None else output.shape
    return out, math.prod(rest)


def _lost(output: Output, stored: Dequantized, criterion: Criterion, kind: DType) -> tuple[Target, Update, Cut]:
    """Return (target, LoRA, report) for one output; the LoRA approximates the exact merge minus the stored weight."""
    from ..ops.resizing import Cut, seed_of
    from ..ops.sketching import dominant

    given = output.folds[0].target
    # Use the whole weight as the target, even if the adapter targets the parts of a fused weight.
    target = Target(given.path, given.layout)
    D = view(_exact(output) - load(stored.tensors[output.name]), target)
    shape = D.shape[1:] if target.stacked else D.shape
    weights = [one.reshape(shape[0], -1) for one in (D if target.stacked else [D])]
    decomposed = [dominant(one, criterion, seed_of(f"{target}:{e}")) for e, one in enumerate(weights)]
    lora = low_rank(target, shape, [balanced(*each) for each in decomposed], None, kind)
    deltas = Change(target, shape, (lora,)).deltas()
    error = math.hypot(*(left(one, delta.B, delta.A) for one, delta in zip(weights, deltas, strict=True)))
    norm = math.hypot(*(frobenius(one) for one in weights))
    return target, lora, Cut(str(target), "lora", min(weights[0].shape), lora.A.shape[-len(shape)], norm, error)


def _exact(output: Output) -> Array:
    """Compute the exact merge of one tensor, rounded to float32."""
    import numpy as np

    arrays, whole = NumpyArrays(), np.empty(output.shape, np.float32)
    flat = whole.reshape(-1)
    with arrays.quiet():
        merger = BlockMerger(output, Workspace(arrays))
        for block in blocks(output):
            read = memoryview(output.source.read(block.first, block.elements))
            raw = arrays.over(read, output.source.dtype)
            flat[block.first : block.first + block.elements] = merger.exact(raw, block)
    return whole
