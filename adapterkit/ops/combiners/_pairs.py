"""Methods of B and A themselves: what they give depends on how a product was split."""

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


LOW_RANK = "Make it a LoRA: adapterkit resize A --promote (ak.ops.promote); or choose another --method (method=)"

ONE_RANK = "Bring all to one rank: adapterkit resize A --rank R; or choose another method by --method (method=)"


class Pairwise(Combiner):
    """The formula sees the factors of each change."""

    @abstractmethod
    def factors(self, Bs: list[Array], As: list[Array], at: FormulaContext) -> tuple[Array, Array]:
        """B `[out, r]` and A `[r, in * k]` of the result from those of all tasks, weights already in B."""

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        from ..lowering import Delta

        checked_pairs(deltas, at, equal=False)
        Bs = [w * delta.B for delta, w in zip(deltas, weights, strict=True)]
        return Delta(*self.factors(Bs, [delta.A for delta in deltas], at))


def checked_pairs(deltas: Sequence[Delta], at: FormulaContext, *, equal: bool = True) -> None:
    """Refuses changes without thin factors, and ranks that differ where factors are put on top of one another.

    Raises:
        UsageError: as said.
    """
    if any(delta.rest is not None for delta in deltas):
        raise UsageError("a change without thin factors", where=str(at.target), cure=LOW_RANK)
    ranks = [delta.rank for delta in deltas]
    if equal and len(set(ranks)) > 1:
        why = f"factors of ranks {', '.join(map(str, ranks))} cannot be summed apart"
        raise UsageError(why, where=str(at.target), cure=ONE_RANK)
