"""TARA: learn a coefficient for each direction of each adapter, to minimise the tasks' preference-weighted entropies.

Jeong et al. 2026, https://arxiv.org/abs/2603.26299. The directions are either the rank-one products b_j a_j of each
adapter (`factors`, the paper's Variant A), or the singular directions of the concatenated changes (`shared`, Variant
B). All coefficients are initially `start` / T. AdamW minimises alpha * log(sum_t exp(p_t (l_t - s_t) / alpha)), where
l_t is the entropy of the combination on task t, and s_t is the entropy of adapter t alone. By default, p_t is 1 / T.
The default start, steps and rate are the values for eight tasks in https://github.com/wooseong97/TARA-Merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import UsageError
from ...linalg.namespace import summed
from ..alignment import side_by_side
from ._combiner import LOW_RANK, parameter
from ._learned import Learned, trained

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Change, Delta
    from ._learned import WeightTrial

TOGETHER = (
    "a callable: score(adapter, together) -> (loss, {target's path: gradient of the loss with respect to the weight, "
    "[out, in, *k]}), with loss = together(losses) or together(losses, alone); `losses` has each task's loss with "
    "the combined adapter, and `alone` has each task's loss with only that task's adapter; a loss can be an entropy on "
    "unlabelled samples"
)
DIRECTIONS = "each adapter's rank-one products (factors, Variant A), or joint singular directions (shared, Variant B)"


class TARA(Learned):
    """sum_t w_t sum_j c_tj b_tj a_tj with learned c; direction j of task t is a column b_tj times a row a_tj."""

    title = "Task-rank anisotropy alignment (TARA)"
    paper = "https://arxiv.org/abs/2603.26299"
    data: ClassVar[str | None] = TOGETHER
    learns: ClassVar[str | None] = "entropies_together"
    by_part: ClassVar[bool] = True
    single = frozenset({"preference"})

    directions: str = parameter("factors", DIRECTIONS, among=("factors", "shared"))
    start: float = parameter(3.2, "every coefficient is initially start / T, where T is the number of tasks")
    preference: float | None = parameter(None, "p_t, a task's weight in the loss; default: 1 / T", kind=float, least=0)
    alpha: float = parameter(1.0, "smoothness of the loss; near 0, only the worst task counts", least=0)
    steps: int = parameter(250, "number of steps of AdamW", least=1)
    rate: float = parameter(1e-3, "learning rate of AdamW", least=0)
    decay: float = parameter(0.01, "weight decay of AdamW", least=0)

    def check(self) -> None:
        if self.alpha <= 0:
            raise UsageError("alpha is 0, but the loss divides by alpha", where="alpha", cure="Choose an alpha above 0")

    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        import numpy as np

        shares = [one.get("preference", self.preference) for one in trial.each or [{}] * trial.count]
        shares = [1 / trial.count if share is None else share for share in shares]

        def together(losses: Sequence[Any], alone: Sequence[Any] | None = None) -> Any:
            """Combine the tasks' losses into one loss.

            Args:
                losses: the losses l_t: floats, or scalars of a library with the methods `exp` and `log`.
                alone: the losses s_t: for each task, the loss with only this task's adapter. Each s_t is subtracted
                    from l_t. If `alone` is None, nothing is subtracted.
            """
            if len(losses) != trial.count:
                why = f"together() got {len(losses)} losses for {trial.count} tasks"
                raise UsageError(why, where="data", cure="Pass one loss for each task")
            above = (
                losses if alone is None else [loss - loss_alone for loss, loss_alone in zip(losses, alone, strict=True)]
            )
            terms = [_exp(share * loss / self.alpha) for share, loss in zip(shares, above, strict=True)]
            return self.alpha * _log(sum(terms[1:], terms[0]))

        score: Any = trial.score
        start = {t: np.full(self._count(trial.changes(t), t), self.start / trial.count) for t in trial.targets}
        return trained(
            replace(trial, score=lambda adapter: score(adapter, together)), start, self.steps, self.rate, self.decay
        )

    def sums(self, weights: Sequence[float]) -> list[float] | None:
        return None

    def products(self, changes: Sequence[Change | None], weights: Sequence[float], G: Array) -> Array:
        import numpy as np

        stacked = any(change is not None and change.experts is not None for change in changes)
        total: Any = 0.0
        # All experts of a stack have the same number of directions, and share one coefficient per direction.
        for expert, row in enumerate(side_by_side(changes)):
            slopes = []
            for w, part in zip(weights, self._parts(row), strict=True):
                if part is not None:
                    g = (G[expert] if stacked else G).reshape(part.shape)
                    slopes.append(w * ((part.B.T @ g) * part.A).sum(1))
            total = total + np.concatenate(slopes)
        products: Array = total
        return products

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta

        parts = [part for part in self._parts(deltas) if part is not None]
        assert at.learned is not None
        scales = at.learned * np.repeat(weights, [part.rank for part in parts])
        if self.directions == "factors":
            return Delta(np.hstack([part.B for part in parts]) * scales, np.vstack([part.A for part in parts]))
        # All parts have the same B, so the result has the rank of this B.
        ends = np.split(scales, len(parts))
        return Delta(parts[0].B, summed(c[:, None] * part.A for c, part in zip(ends, parts, strict=True)))

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        # A bias has no directions; scale it by the mean of all coefficients of the target.
        learned = at.learned if at.learned is not None and len(at.learned) else np.full(1, self.start / len(changes))
        vector: Array = weights @ changes * learned.mean()
        return vector

    def _count(self, changes: Sequence[Change | None], target: Target) -> int:
        """Return the number of coefficients of a target.

        Raises:
            UsageError: a change has no low-rank factors, and therefore no directions.
        """
        row: Sequence[Delta | None] = next(iter(side_by_side(changes)), ())
        if any(delta is not None and delta.rest is not None for delta in row):
            raise UsageError("a change has no low-rank factors", where=str(target), cure=LOW_RANK)
        return sum(part.rank for part in self._parts(row) if part is not None)

    def _parts(self, row: Sequence[Delta | None]) -> list[Delta | None]:
        """Return each change as factors B and A. Column j of B and row j of A form direction j."""
        import numpy as np

        from ..lowering import Delta
        from ..lowrank import core

        present = [delta for delta in row if delta is not None]
        if self.directions == "factors" or not present:
            return list(row)
        common = core(present)
        U, S, Vh = np.linalg.svd(np.hstack(common.cores), full_matrices=False)
        columns = np.split(Vh, len(present), 1)
        parts = iter([Delta(common.left @ U * S, V @ common.right) for V in columns])
        return [None if delta is None else next(parts) for delta in row]


def _exp(value: Any) -> Any:
    return value.exp() if hasattr(value, "exp") else math.exp(value)


def _log(value: Any) -> Any:
    return value.log() if hasattr(value, "log") else math.log(value)
