"""PCB: score each entry by its magnitude and its agreement with other tasks, and average entries, weighted by scores.

Task t's entry x_t has the score exp(T m_t^2) tanh(x_t sum_s x_s), where T is the number of tasks. To compute m_t, the
magnitudes of the task's entries are clamped to their quantiles 0.0001 and 0.9999, and scaled to the range from 0 to 1.
Scores below the quantile `1 - ratio` become 0, and the other scores are scaled to the range from 0 to 1. The result is
the mean of the clamped entries, weighted by the scores.

Du et al. 2024, https://arxiv.org/abs/2410.02396. By default, quantiles are computed over a whole adapter, as in
https://github.com/duguodong7/pcb-merging. There, the default of ratio is 0.1, and the examples use 0.05.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import Entrywise

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula

    Wanted = Callable[[int, int], int]

OUTSIDE = 1e-4
"""The share of the magnitudes that is clamped at each end of their range."""


class PCB(Entrywise):
    """lambda * sum_t s_t x_t / sum_t s_t with scores s_t and clamped entries x_t."""

    title = "Parameter competition balancing (PCB)"
    paper = "https://arxiv.org/abs/2410.02396"
    depends: ClassVar = frozenset({"size"})
    stages: ClassVar[int] = 2

    ratio: float = parameter(0.1, "share of a task's entries to keep; the highest scores are kept", least=0, most=1)
    scope: str = parameter(
        "model", "compute quantiles over a whole adapter (model) or in each tensor (tensor)", among=("model", "tensor")
    )

    @property
    def counts(self) -> bool:
        return self.scope == "model"

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        names = [(end, t) for end in ("least", "most") for t in at.present]
        ends = _ends(blocks.count)
        if not at.census.knows(names[0]):
            at.census.count(names, blocks, ends, lambda changes: _twice(changes, weights))
            return
        bounds = self._known(("least", "most"), at)
        scores = [(end, t) for end in ("positive", "negative", "best") for t in at.present]
        wanted = self._scores(blocks.count)
        at.census.count(scores, blocks, wanted, lambda changes: _signed(_scored(changes, weights, bounds)))

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        if self.scope == "model":
            bounds, (positive, negative, best) = (
                self._known(("least", "most"), at),
                self._known(("positive", "negative", "best"), at),
            )
        else:
            selections = blocks.select(lambda changes: _twice(changes, weights), _ends(blocks.count))
            bounds = np.reshape([each.value for each in selections], (2, -1, 1, 1))
            selections = blocks.select(
                lambda changes: _signed(_scored(changes, weights, bounds)), self._scores(blocks.count)
            )
            positive, negative, best = np.reshape([each.value for each in selections], (3, -1, 1, 1))
        # The quantile of the scores is `positive` if `positive` is above 0. Otherwise, the quantile is `-negative`.
        least = np.where(positive > 0, positive, -negative)
        span = np.where(best > least, best - least, 1.0)

        def formula(changes: Array, _: slice) -> Array:
            parts = np.clip((_scored(changes, weights, bounds) - least) / span, 0.0, 1.0)
            each = weights[:, None, None] * changes
            each = np.sign(each) * np.clip(np.abs(each), bounds[0], bounds[1])
            result: Array = self.scale * (parts * each).sum(0) / np.maximum(parts.sum(0), 1e-12)
            return result

        return formula

    def _scores(self, count: int) -> list[Wanted]:
        """Return the argument `wanted` of `Blocks.select` for the three series per change that `_signed` returns.

        One number is selected from each series. Let q be the quantile 1 - ratio of the scores. The number from the
        first series is q if q is positive, else 0. The number from the second series is |q| if q is negative, else 0.
        The number from the third series is the largest score, or 0 if no score is positive.
        """

        def place(total: int) -> int:
            return total - min(int(total * (1 - self.ratio)), total - 1)

        return [
            *[lambda total, _: place(total)] * count,
            *[lambda total, _: total - place(total) + 1] * count,
            *[lambda *_: 1] * count,
        ]

    def _known(self, names: Sequence[str], at: FormulaContext) -> Array:
        import numpy as np

        limits = [at.census.threshold((name, t)) for name in names for t in at.present]
        return np.reshape(limits, (len(names), -1, 1, 1))


def _ends(count: int) -> list[Wanted]:
    """Return the argument `wanted` of `Blocks.select` for the magnitudes that `_twice` returns.

    The first `count` functions find the lower quantile of each change, and the others find the upper quantile.
    """
    low: Wanted = lambda total, _: total - int(total * OUTSIDE)  # noqa: E731
    high: Wanted = lambda total, _: total - max(int(total * (1 - OUTSIDE) - 1), 0)  # noqa: E731
    return [*[low] * count, *[high] * count]


def _twice(changes: Array, weights: Array) -> Array:
    import numpy as np

    sizes = np.abs(weights.reshape(-1, *[1] * (changes.ndim - 1)) * changes)
    return np.concatenate([sizes, sizes])


def _scored(changes: Array, weights: Array, bounds: Array) -> Array:
    import numpy as np

    shape = (-1, *[1] * (changes.ndim - 1))
    each, (least, most) = weights.reshape(shape) * changes, (end.reshape(shape) for end in bounds)
    scaled_sizes = (np.clip(np.abs(each), least, most) - least) / np.where(most > least, most - least, 1.0)
    return np.asarray(np.exp(len(changes) * scaled_sizes * scaled_sizes) * np.tanh(each * each.sum(0)))


def _signed(scores: Array) -> Array:
    """Return three series per change: positive scores, magnitudes of negative scores, and positive scores again.

    A series of positive scores contains 0 for each negative score, and the series of negative scores contains 0 for
    each positive score. The third series is for the search for the largest score.
    """
    import numpy as np

    # A `Selection` finds the k-th largest of nonnegative numbers, so each sign needs a separate series.
    positive = np.maximum(scores, 0.0)
    return np.concatenate([positive, np.maximum(-scores, 0.0), positive])
