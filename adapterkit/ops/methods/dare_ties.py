"""DARE and TIES: entries are dropped at random and the rest scaled up; then signs are elected and what agrees averaged.

Yu et al. 2023, https://arxiv.org/abs/2311.03099. Alone a model keeps its abilities with 0.1 of the entries; for
merging, the README of https://github.com/yule-BUAA/MergeLM drops 0.2 of them, and that is the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import DENOMINATOR, DENOMINATORS, RESCALE, RESCALES, SIGN, SIGNS, ZERO_SIGN, ZERO_SIGNS, Sparse
from ._method import parameter
from .dare_linear import drawn

if TYPE_CHECKING:
    from ..at import At
    from ..blocks import Blocks
    from ._entrywise import Mask


class DareTIES(Sparse):
    """lambda * mean of the entries of m_t D_t / p that have the elected sign."""

    title = "DARE, then TIES"
    paper = "https://arxiv.org/abs/2311.03099"
    single = frozenset({"density"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "rescale": "norm", "weighted_vote": True, "zero_sign": "+", "denominator": "none",
        },
        "peft": {"zero_sign": "+"},
    }  # fmt: skip

    density: float = parameter(0.8, "probability p that an entry is kept", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)
    sign: str = parameter("total", SIGN, among=SIGNS)
    zero_sign: str = parameter("majority", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("count", DENOMINATOR, among=DENOMINATORS)

    def mask(self, blocks: Blocks, at: At) -> Mask:
        return drawn(at.each(self, "density"), at)
