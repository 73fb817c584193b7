"""Core Space: apply another method to small cores M_t instead of the changes D_t.

D_t = U M_t V^T, with the same U and V for all tasks. The columns of U are the left singular vectors of [B_1 .. B_T].
The columns of V are the right singular vectors of [A_1; ..; A_T]. Linear methods have the same result on
cores as on whole matrices. If the other method is TIES, it trims each core separately. Panariello et al. 2025,
https://arxiv.org/abs/2509.17786; the trimming is as in https://github.com/apanariello4/core-space-merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import NOISE, PlugIn, between, parameter, whole

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta

BASIS = "matrices that give the singular vectors: the trained factors (factors), or the products B A (products)"


class CoreSpace(PlugIn):
    """U then(M_1 .. M_T) V^T, where `then` is the other method."""

    title = "Core Space, with another method in it"
    paper = "https://arxiv.org/abs/2509.17786"
    within: ClassVar = {"scope": "tensor"}

    basis: str = parameter("factors", BASIS, among=("factors", "products"))

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        left, cores, right = coordinates(deltas, self.basis)
        merged = self.inner.matrix([whole(M) for M in cores], weights, at)
        return between(left, merged.dense(), right)


def coordinates(deltas: Sequence[Delta], basis: str) -> tuple[Array, list[Array], Array]:
    """Return U `[out, p]`, all M_t `[p, q]`, and V^T `[q, in * k]`."""
    import numpy as np

    from ..lowrank import whole_core

    common = whole_core(deltas)
    by_factors = basis == "factors" and all(delta.rest is None for delta in deltas)
    if by_factors:
        rows = common.left.T @ np.hstack([delta.B for delta in deltas])
        columns = np.vstack([delta.A for delta in deltas]) @ common.right.T
    else:
        rows, columns = np.hstack(common.cores), np.vstack(common.cores)
    # `rows` and `columns` are small if all changes have low-rank factors. The factors themselves have as many rows or
    # columns as the weight, so decomposing them would take longer.
    U, S, _ = np.linalg.svd(rows, full_matrices=False)
    _, R, Vh = np.linalg.svd(columns, full_matrices=False)
    if not by_factors:
        # The cores of dense changes are as large as the weight. Drop directions that contain only rounding noise,
        # because methods such as TIES would count the entries of these directions.
        U, Vh = (X[: int((NOISE * s[:1].max(initial=0) < s).sum())] for X, s in ((U.T, S), (Vh, R)))
        U = U.T
    return common.left @ U, [U.T @ M @ Vh.T for M in common.cores], Vh @ common.right
