"""Magnitude pruning: the smallest entries of each change are dropped, the rest is summed.

Han et al. 2015, https://arxiv.org/abs/1506.02626; of task vectors: TIES without an election.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import COUNTS, DENSITY, KEPT, Sparse, count_of, largest
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class MagnitudePrune(Sparse):
    """lambda * sum_t w_t * the largest entries of D_t."""

    title = "Magnitude pruning"
    paper = "https://arxiv.org/abs/1506.02626"
    single = frozenset({"density"})
    compat: ClassVar = {"peft": {"kept": "floor"}}

    density: float = parameter(0.5, DENSITY, least=0, most=1)
    kept: str = parameter("floor", KEPT, among=COUNTS)

    def sparse(self, D: Array, t: int, at: At) -> Array:
        return D * largest(D, count_of(at.each(self, "density")[t], D.size, self.kept))
