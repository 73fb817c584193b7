"""Model Breadcrumbs: each change loses its largest and its smallest entries; then task arithmetic, or an election.

Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795: what lies between the quantiles 0.85 and 0.993 of a layer
stays. The authors' code, https://github.com/rezazzr/breadcrumbs, takes them of each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import DENSITY, RESCALE, Sparse, rescaled
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


SCOPE = "what the shares are of: each tensor, as in the paper, or each of its rows, as in its authors' code"


class Breadcrumbs(Sparse):
    """lambda * sum_t w_t m_t D_t: of the magnitudes in a tensor the gamma n largest go, then the smallest."""

    title = "Model Breadcrumbs"
    paper = "https://arxiv.org/abs/2312.06795"
    single = frozenset({"density", "gamma"})
    compat: ClassVar = {"mergekit": {"density": 1.0, "gamma": 0.01, "weighted_vote": True}}

    density: float = parameter(0.143, DENSITY, least=0, most=1)
    gamma: float = parameter(0.007, "share of the entries, the largest, that is dropped", least=0, most=1)
    scope: str = parameter("tensor", SCOPE, among=("tensor", "row"))
    rescale: str = parameter("none", RESCALE, among=("none", "norm"))

    def sparse(self, D: Array, t: int, at: At) -> Array:
        import numpy as np

        density, gamma = at.each(self, "density")[t], at.each(self, "gamma")[t]
        if density >= 1:
            return D
        sizes = np.abs(D).reshape(-1, D.size if self.scope == "tensor" else D.shape[-1])
        count = sizes.shape[1]
        kept = int(density * count)
        first = max(count - kept - int(gamma * count), 0)
        mask = np.zeros(sizes.shape, bool)
        np.put_along_axis(mask, np.argsort(sizes, 1, kind="stable")[:, first : first + kept], True, 1)
        return rescaled(D, mask.reshape(D.shape), 1.0, self.rescale)
