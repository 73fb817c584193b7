"""DARE: entries are dropped at random and the rest scaled up, so that the mean stays; then task arithmetic.

Yu et al. 2023, https://arxiv.org/abs/2311.03099. Alone a model keeps its abilities with 0.1 of the entries; for
merging, the README of https://github.com/yule-BUAA/MergeLM drops 0.2 of them, and that is the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import RESCALE, RESCALES, Sparse, rescaled
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class Dare(Sparse):
    """lambda * sum_t w_t m_t D_t / p, every entry of m_t being 1 with probability p."""

    title = "DARE, then task arithmetic"
    paper = "https://arxiv.org/abs/2311.03099"
    single = frozenset({"density"})
    compat: ClassVar = {"mergekit": {"density": 1.0, "rescale": "norm"}, "peft": {}}

    density: float = parameter(0.8, "probability p that an entry is kept", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)

    def sparse(self, D: Array, t: int, at: At) -> Array:
        return dropped(D, at.each(self, "density")[t], self.rescale, t, at)


def dropped(D: Array, density: float, how: str, t: int, at: At) -> Array:
    """D with entries dropped at random."""
    if density >= 1:
        return D
    return rescaled(D, at.uniform(t, D.shape) < density, density, how)
