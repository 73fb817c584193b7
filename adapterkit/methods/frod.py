"""FRoD: W' = U (S + diag(l)) V^T in a basis that layers share.  https://doi.org/10.1609/aaai.v40i31.39813

All layers of a kind share the invertible matrix V. The columns of U have length 1, so the base's weight
W = U diag(c) V^T determines U and the vector c. Training starts with l = c and S = 0. Training changes l, and the few
elements of S at the positions in `index`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class FRoD(WeightUpdate):
    """W' = U @ (S + diag(l)) @ V^T, where S has `values` at (row, column) = `index`, and 0 elsewhere.

    U is W @ inverse(V^T), with each column scaled to length 1.
    """

    linear_only = True
    frozen = frozenset({"V"})
    paper = "https://doi.org/10.1609/aaai.v40i31.39813"

    l: Tensor = tensor("in")  # noqa: E741 - the paper's name
    values: Tensor = tensor("n")
    V: Tensor = tensor("in in")
    index: Tensor = tensor("2 n", integer=True, below="in in", distinct=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        size = W.shape[1]
        V = namespace(W).linalg.svd(W, full_matrices=True)[2].mT
        places = random((size * size,)).argsort()[: min(rank, size) * size]
        index = namespace(W).stack([places // size, places % size])
        return cls.from_fields(l=_spanned(W, V)[1], values=W.new_zeros(len(places)), V=V, index=index, **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        xp, U = namespace(W), _spanned(W, self.V)[0]
        S = xp.zeros_like(self.V)
        S[self.index[0], self.index[1]] = self.values
        changed: Tensor = (U @ S + U * self.l) @ self.V.mT
        return changed


def _spanned(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and l with `W = U diag(l) V^T`, where the columns of U have length 1.

    If an element of l is at most 1e-12, this element and its column of U are 0. The function computes in float64 for
    every dtype. With less precision, rounding errors would turn columns that should be 0 into columns of length 1.
    """
    xp = namespace(W)
    G = _solved(xp.astype(V, xp.float64), xp.astype(W, xp.float64))
    square = (G * G).sum(0)
    nonzero = square > 1e-24
    length = xp.where(nonzero, square, square * 0 + 1) ** 0.5
    kept = xp.astype(nonzero, G.dtype)
    return xp.astype(G / length * kept, W.dtype), xp.astype(length * kept, W.dtype)


def _solved(V: Tensor, W: Tensor) -> Tensor:
    """Return W @ inverse(V^T), or W times the pseudoinverse of V^T if V is singular."""
    linalg = namespace(V).linalg
    try:
        return linalg.solve(V, W.mT).mT
    except (ValueError, RuntimeError):
        return W @ linalg.pinv(V, rtol=1e-6).mT
