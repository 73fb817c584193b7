"""DELLA: small entries are dropped more often than large ones, by their rank in a row; then an election, then the mean.

Deep et al. 2024, https://arxiv.org/abs/2406.11617. Defaults are those of https://github.com/declare-lab/della: its
README drops 0.3 with a window of 0.14, which its code halves (`epsilon = window_size / 2`); there the vote and the mean
are of weighted changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._entrywise import DENOMINATOR, DENOMINATORS, RESCALE, RESCALES, SIGN, SIGNS, WEIGHTED_VOTE, Sparse, rescaled
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class Della(Sparse):
    """As DARE and TIES, with p from density - epsilon for a row's smallest to density + epsilon for its largest."""

    title = "DELLA"
    paper = "https://arxiv.org/abs/2406.11617"
    single = frozenset({"density", "epsilon"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "epsilon": 0.15, "rescale": "norm", "weighted_vote": True, "zero_sign": "+",
            "denominator": "weights",
        },
    }  # fmt: skip

    density: float = parameter(0.7, "mean probability that an entry is kept", least=0, most=1)
    epsilon: float = parameter(0.07, "how far the probabilities are from their mean at most", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)
    sign: str = parameter("total", SIGN, among=SIGNS)
    weighted_vote: bool = parameter(True, WEIGHTED_VOTE)
    denominator: str = parameter("weights", DENOMINATOR, among=DENOMINATORS)

    def sparse(self, D: Array, t: int, at: At) -> Array:
        import numpy as np

        density, epsilon = at.each(self, "density")[t], at.each(self, "epsilon")[t]
        if density >= 1:
            return D
        if not 0 < density - epsilon <= density + epsilon < 1:
            why = f"density {density} and epsilon {epsilon} give probabilities outside of 0 to 1"
            raise UsageError(why, where="epsilon", cure="Choose a smaller epsilon")
        ranks = np.argsort(np.argsort(np.abs(D), axis=-1, kind="stable"), axis=-1)
        chance = density - epsilon + 2 * epsilon * ranks / max(D.shape[-1] - 1, 1)
        return rescaled(D, at.uniform(t, D.shape) < chance, chance, self.rescale)
