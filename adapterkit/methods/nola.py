"""NOLA: LoRA whose A and B are sums of random matrices.  Koohpayegani et al. 2023, https://arxiv.org/abs/2310.02556

W' = W + scaling * B @ A, with A = sum alpha_i A_i / sqrt(p) over p random matrices A_i. B is computed in the same way
from q random matrices B_i. The specification defines a random generator that computes the matrices from seeds, so only
a few of the matrices are in memory at a time. Matrices from another generator are stored in `A_bases` and `B_bases`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.philox import combine
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class NOLA(LowRank):
    """A = A0 + sum alpha_i A_i / sqrt(p), B = B0 + sum beta_i B_i / sqrt(q).

    The matrices A_i and B_i are computed from `seeds`, or stored in `A_bases` and `B_bases`.
    """

    paper = "https://arxiv.org/abs/2310.02556"
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ((("seeds",), ("A_bases", "B_bases")),)
    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0", "A_bases", "B_bases"})

    alpha: Tensor = tensor("p")
    beta: Tensor = tensor("q")
    seeds: Tensor | None = tensor("r", integer=True, optional=True)
    A_bases: Tensor | None = tensor("p r in *k", optional=True)
    B_bases: Tensor | None = tensor("q out r", optional=True)
    A0: Tensor | None = tensor("r in *k", optional=True)
    B0: Tensor | None = tensor("out r", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, beta: int = 256, **attributes: object
    ) -> Self:
        """Start with B = 0. The elements of A have the same magnitude as in a new LoRA.

        `beta` is the number of random matrices A_i, and also of random matrices B_i.
        """
        n = int(beta)
        high, low = (int(part) for part in (random((2,)).abs() * (1 << 23)).tolist())
        seeds = (high << 24) + low + W.new_ones(rank).long().cumsum(0)
        alpha = random((n,)) * (3 / math.prod(W.shape[1:])) ** 0.5
        return cls.from_fields(alpha=alpha, beta=W.new_zeros(n), seeds=seeds, **attributes)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self.seeds is None:
            A, B = _mixed(self.alpha, self.A_bases), _mixed(self.beta, self.B_bases)
        else:
            A = combine(self.alpha, self.seeds, 0, math.prod(shape[1:]))
            B = combine(self.beta, self.seeds, 1, shape[0]).mT
        A = A.reshape(len(A), math.prod(shape[1:])) / max(len(self.alpha), 1) ** 0.5
        B = B / max(len(self.beta), 1) ** 0.5
        B = B if self.B0 is None else B + self.B0
        return self.scaling * B, A if self.A0 is None else A + self.A0.reshape(A.shape)


def _mixed(coefficients: Tensor, bases: Tensor | None) -> Tensor:
    assert bases is not None
    # Pass the number of columns to `reshape`: without any basis matrices, -1 would be ambiguous.
    return (coefficients @ bases.reshape(len(bases), math.prod(bases.shape[1:]))).reshape(bases.shape[1:])
