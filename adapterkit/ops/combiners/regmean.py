"""RegMean: compute, in closed form, the change whose outputs on each task's inputs are nearest to that task's outputs.

D = (sum_t w_t D_t G_t) (sum_t w_t G_t)^-1 with G_t = X_t^T X_t, where X_t are the inputs of task t. The off-diagonal
entries of G_t are multiplied by alpha. Jin et al. 2022, https://arxiv.org/abs/2212.09849
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import UsageError
from ...linalg.namespace import summed
from ._combiner import Combiner, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta

INPUTS = "a callable: inputs(index of the adapter, target's path) -> X [samples, in * k], the target's inputs"
CUT = 1e-12
"""Eigenvalues of sum_t w_t G_t count as zero if they are below this fraction of the largest eigenvalue."""

ALPHA = "factor of the off-diagonal entries of X^T X"


class RegMean(Combiner):
    """The least-squares solution over all tasks.

    If all changes are low-rank, the result is low-rank, because D_t G_t is B_t (A_t G_t).
    """

    title = "Regression mean (RegMean)"
    paper = "https://arxiv.org/abs/2212.09849"
    data: ClassVar[str | None] = INPUTS
    learns: ClassVar[str | None] = "inputs"

    alpha: float = parameter(0.9, ALPHA, least=0, most=1)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return regressed(deltas, weights, self.alpha, at)


def regressed(deltas: Sequence[Delta], weights: Array, alpha: float, at: FormulaContext) -> Delta:
    """Return the combined change of one weight, for RegMean and RegMean++."""
    import numpy as np

    from ..lowering import Delta

    grams = [
        w * _damped(gram_of(at, t, delta.shape[1]), alpha)
        for t, (delta, w) in enumerate(zip(deltas, weights, strict=True))
    ]
    whole = summed(grams)
    # For input features that are 0 in all samples of all tasks, use the mean of the changes.
    unseen = np.diag(np.where(whole.diagonal() == 0, 1.0, 0.0))
    grams = [G + unseen for G in grams]
    divided = _divider(summed(grams), 1 - alpha if min(weights) >= 0 else 0.0)
    A = divided(np.vstack([delta.A @ G for delta, G in zip(deltas, grams, strict=True)]))
    rests = [delta.rest @ G for delta, G in zip(deltas, grams, strict=True) if delta.rest is not None]
    return Delta(np.hstack([delta.B for delta in deltas]), A, divided(summed(rests)) if rests else None)


def _divider(G: Array, damping: float) -> Callable[[Array], Array]:
    """Return a function X -> X G^+, for a symmetric G.

    Eigenvalues count as zero if they are below `CUT` times the largest eigenvalue.

    Args:
        G: sum_t w_t G_t, with the off-diagonal entries multiplied by alpha.
        damping: 1 - alpha if no weight is negative, else 0.
    """
    import numpy as np

    # Every eigenvalue is at least `damping` times the smallest diagonal entry, and at most the trace. If these bounds
    # show that no eigenvalue counts as zero, solve the linear system. This takes a tenth of a decomposition's time.
    if damping * G.diagonal().min() > CUT * G.trace():
        return lambda X: np.asarray(np.linalg.solve(G, X.T).T)
    inverse = np.linalg.pinv(G, CUT, hermitian=True)
    return lambda X: np.asarray(X @ inverse)


def _damped(G: Array, alpha: float) -> Array:
    """Return G with its off-diagonal entries multiplied by alpha."""
    import numpy as np

    result: Array = alpha * G + (1 - alpha) * np.diag(G.diagonal())
    return result


def gram_of(at: FormulaContext, t: int, columns: int) -> Array:
    """Return G_t = X_t^T X_t `[in * k, in * k]` for the inputs X_t that the caller's `data` function returns.

    Raises:
        UsageError: the inputs do not fit the weight, or the target is a stack of experts.
    """
    import numpy as np

    assert at.asks is not None
    where = str(at.target)
    if at.part not in ("weight", "bias"):
        why = "the method needs the target's inputs, but the inputs of stacked experts are unknown"
        raise UsageError(why, where=where, cure="Choose a --method (method=) that needs no data")
    activations: Any = at.asks(at.present[t], where)
    # The caller may return a torch tensor on any device; convert it without importing torch.
    X = np.asarray(activations.detach().cpu() if hasattr(activations, "detach") else activations, np.float64)
    if X.ndim < 2 or X.shape[-1] != columns or not np.isfinite(X).all():
        why = f"the inputs must be finite and have {columns} columns; their shape is {list(X.shape)}"
        raise UsageError(why, where=where, cure=f"data= must be {INPUTS}")
    X = X.reshape(-1, columns)
    G: Array = X.T @ X
    return G
