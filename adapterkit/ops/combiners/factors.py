"""Combine all A with another combiner, and all B with the same combiner.

The result also contains products B_s A_t of factors from two tasks.

PEFT combines factors in this way for `linear`, `ties`, `dare_*` and `magnitude_prune`:
https://huggingface.co/docs/peft/developer_guides/model_merging. With c_t = w_t * scaling_t, the weight of A_t is
sign(c_t) sqrt|c_t|, and the weight of B_t is sqrt|c_t|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ._combiner import PlugIn, checked_pairs, whole

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class FactorsCombiner(PlugIn):
    """then(B_1 .. B_T) @ then(A_1 .. A_T), where `then` is the inner combining method."""

    title = "A and B separately, by another method"
    paper = "https://huggingface.co/docs/peft/developer_guides/model_merging"
    depends: ClassVar = frozenset({"factors"})

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta

        checked_pairs(deltas, at)
        s = np.array([scaling or 1.0 for scaling in at.scalings])
        c = weights * s
        each = [
            [whole(delta.B / factor) for delta, factor in zip(deltas, s, strict=True)],
            [whole(d.A) for d in deltas],
        ]
        B = self.inner.matrix(each[0], np.sqrt(np.abs(c)), replace(at, part=f"{at.part} B")).dense()
        A = self.inner.matrix(each[1], np.sign(c) * np.sqrt(np.abs(c)), replace(at, part=f"{at.part} A")).dense()
        return Delta(B, A)
