"""Base class of methods that combine B and A instead of the product B A.

The result depends on how each product was split into B and A.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import UsageError
from ._combiner import Combiner

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


LOW_RANK = "Convert it to LoRA by adapterkit resize A --promote (ak.ops.promote), or choose another --method (method=)"

ONE_RANK = "Resize all adapters to one rank by adapterkit resize A --rank R, or choose another --method (method=)"


class Pairwise(Combiner):
    """A combiner whose formula gets B and A of each change."""

    @abstractmethod
    def factors(self, Bs: list[Array], As: list[Array], at: FormulaContext) -> tuple[Array, Array]:
        """Combine the tasks' B and A; return B `[out, r]` and A `[r, in * k]` of the result.

        Each task's B is multiplied by its weight.
        """

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        from ..lowering import Delta

        checked_pairs(deltas, at, equal=False)
        Bs = [w * delta.B for delta, w in zip(deltas, weights, strict=True)]
        return Delta(*self.factors(Bs, [delta.A for delta in deltas], at))


def checked_pairs(deltas: Sequence[Delta], at: FormulaContext, *, equal: bool = True) -> None:
    """Check that all changes have low-rank factors and, if `equal` is set, that their ranks are equal.

    Raises:
        UsageError: a change has no low-rank factors, or the ranks differ.
    """
    if any(delta.rest is not None for delta in deltas):
        raise UsageError("a change has no low-rank factors", where=str(at.target), cure=LOW_RANK)
    ranks = [delta.rank for delta in deltas]
    if equal and len(set(ranks)) > 1:
        why = f"factors of ranks {', '.join(map(str, ranks))} cannot be summed separately"
        raise UsageError(why, where=str(at.target), cure=ONE_RANK)
