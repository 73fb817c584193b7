"""LoraHub: search for one weight per adapter on a few examples, without gradients; sum all A and all B separately.

Minimise loss(w) + penalty * mean|w| over w in [-bound, bound], by an evolution strategy with one parent and one child.
The step grows if the child is better, else it shrinks. Huang et al. 2023, https://arxiv.org/abs/2307.13269; the default
bound and penalty are from https://github.com/sail-sg/lorahub. That code searches with nevergrad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...linalg.namespace import summed
from ._combiner import checked_pairs, mixed, parameter
from ._learned import Learned

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta
    from ._learned import WeightTrial


class LoraHub(Learned):
    """(sum_t w_t B_t)(sum_t w_t A_t); with `apart=False`, the result is sum_t w_t B_t A_t."""

    title = "LoraHub"
    paper = "https://arxiv.org/abs/2307.13269"

    apart: bool = parameter(True, "whether to sum A and B separately; the result then contains products B_s A_t")
    steps: int = parameter(40, "number of candidates to score", least=1)
    bound: float = parameter(1.5, "largest magnitude of a weight", least=0)
    penalty: float = parameter(0.05, "penalty * mean|w| is added to the loss, where w are the weights", least=0)

    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        import numpy as np

        random, step = np.random.default_rng(trial.seed), 0.5
        best = np.zeros(trial.count)
        least = self._cost(trial, best)
        for _ in range(self.steps - 1):
            tried = np.clip(best + step * random.standard_normal(trial.count), -self.bound, self.bound)
            cost = self._cost(trial, tried)
            # The one-fifth rule: if more than one child in five is better than its parent, the step grows. Otherwise
            # the step shrinks.
            step *= 1.5 if cost < least else 1.5**-0.25
            if cost < least:
                best, least = tried, cost
        return trial.everywhere(best)

    def _cost(self, trial: WeightTrial, weights: Array) -> float:
        import numpy as np

        return trial.loss(trial.everywhere(weights)) + self.penalty * float(np.abs(weights).mean())

    def sums(self, weights: Sequence[float]) -> list[float] | None:
        return None if self.apart else list(weights)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        from ..lowering import Delta

        if not self.apart:
            return mixed(deltas, weights)
        checked_pairs(deltas, at)
        B = summed(w * delta.B for delta, w in zip(deltas, weights, strict=True))
        A = summed(w * delta.A for delta, w in zip(deltas, weights, strict=True))
        return Delta(B, A)
