"""Pico: damp the output directions that many tasks share, apply another method, and rescale the result.

[B_1 .. B_T] = U S V^T; a_j = 1 / (1 + (T - 1) s_j^2 / sum s^2); B_t <- (I + U diag(a - 1) U^T) B_t. The result is
scaled to the mean Frobenius norm of the changes. Tang and Yang 2026, https://arxiv.org/abs/2604.16826. The Python class
in https://github.com/yixuantt/Pico rescales the merged change in the same way. The command in that repository merges
nothing; it rescales each damped change to the norm that the change had before damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import PlugIn, parameter
from ._entrywise import Scaled
from .core import BASIS

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


RESCALE = (
    "scale the merged change to the mean norm of the changes (merged), scale each damped change to its norm before "
    "damping (each), or scale nothing (none)"
)


class Pico(Scaled, PlugIn):
    """A plug-in that damps the changes before another method combines them, and rescales the result."""

    title = "Pico: shared output directions damped before another method"
    paper = "https://arxiv.org/abs/2604.16826"

    basis: str = parameter("factors", BASIS, among=("factors", "products"))
    rescale: str = parameter("merged", RESCALE, among=("none", "merged", "each"))

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowrank import norm

        U, S = self._directions(deltas)
        damped = 1 / (1 + (len(deltas) - 1) * S**2 / ((S**2).sum() or 1.0)) - 1
        calibrated, norms = [_damped(delta, U, damped) for delta in deltas], [norm(delta) for delta in deltas]
        if self.rescale == "each":
            calibrated = [_brought(delta, size) for delta, size in zip(calibrated, norms, strict=True)]
        merged = self.inner.matrix(calibrated, weights, at)
        result = _brought(merged, float(np.mean(norms))) if self.rescale == "merged" else merged
        return result if self.scale == 1 else result.scaled(self.scale)

    def _directions(self, deltas: Sequence[Delta]) -> tuple[Array, Array]:
        import numpy as np

        from ..lowrank import whole_core

        if self.basis == "factors" and all(delta.rest is None for delta in deltas):
            left, R = np.linalg.qr(np.hstack([delta.B for delta in deltas]))
        else:
            common = whole_core(deltas)
            left, R = common.left, np.hstack(common.cores)
        U, S, _ = np.linalg.svd(R, full_matrices=False)
        return left @ U, S


def _brought(delta: Delta, size: float) -> Delta:
    """Return the change scaled to the Frobenius norm `size`; a change of zero stays zero."""
    from ..lowrank import norm

    now = norm(delta)
    return delta.scaled(size / now) if now else delta


def _damped(delta: Delta, U: Array, factors: Array) -> Delta:
    from ..lowering import Delta

    def through(X: Array) -> Array:
        # Return (I + U diag(factors) U^T) X without computing the matrix in parentheses, which is `[out, out]`.
        result: Array = X + U @ (factors[:, None] * (U.T @ X))
        return result

    return Delta(through(delta.B), delta.A, None if delta.rest is None else through(delta.rest))
