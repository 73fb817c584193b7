"""TIES: small entries are trimmed, each entry's sign is elected, and what agrees with it is averaged.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import (
    COUNTS,
    DENOMINATOR,
    DENOMINATORS,
    DENSITY,
    KEPT,
    RESCALE,
    SIGN,
    SIGNS,
    ZERO_SIGN,
    ZERO_SIGNS,
    Sparse,
    count_of,
    largest,
    rescaled,
)
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class TIES(Sparse):
    """lambda * mean of the entries, among the largest of their change, that have the elected sign."""

    title = "TIES"
    paper = "https://arxiv.org/abs/2306.01708"
    single = frozenset({"density"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "scope": "tensor", "kept": "at_least_one", "weighted_vote": True, "zero_sign": "+",
            "denominator": "weights",
        },
        "peft": {"scope": "tensor", "kept": "floor", "zero_sign": "+"},
    }  # fmt: skip

    density: float = parameter(0.2, DENSITY, least=0, most=1)
    scope: str = parameter(
        "model", "what the largest are sought in: the whole adapter or each tensor", among=("model", "tensor")
    )
    kept: str = parameter("reference", KEPT, among=COUNTS)
    sign: str = parameter("total", SIGN, among=SIGNS)
    zero_sign: str = parameter("majority", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("count", DENOMINATOR, among=DENOMINATORS)

    rescale: str = parameter("none", RESCALE, among=("none", "norm"))

    @property
    def counts(self) -> bool:
        return self.scope == "model" and self.density < 1

    def sparse(self, D: Array, t: int, at: At) -> Array:
        import numpy as np

        density, adapter = at.each(self, "density")[t], at.present[t]
        if density >= 1:
            return D
        if self.scope == "tensor":
            return rescaled(D, largest(D, count_of(density, D.size, self.kept)), 1.0, self.rescale)
        if at.census.counting:
            at.census.feed(adapter, D, lambda total: count_of(density, total, self.kept))
            return 0 * D
        return rescaled(D, np.abs(D) >= at.census.threshold(adapter), 1.0, self.rescale)
