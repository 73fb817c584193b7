"""OSF: trains the part of W with the smallest singular values.  Nayak et al. 2025, https://arxiv.org/abs/2504.07097

W' = W - T + U diag(S) V. T is the part of W with the r smallest singular values; r is the length of S. PEFT computes
T from the base. If an adapter does not store T, adapterkit computes T in the same way, with torch's SVD in
float32. Adapters that adapterkit creates store T. In training, PEFT removes the directions of the other part, W - T,
from the gradients; this does not affect the formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, tensor
from ..linalg.rotations import singular

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class OSF(WeightUpdate):
    """W' = W - T + U @ diag(S) @ V, with T = U_own @ diag(S_own) @ V_own.

    If the adapter does not store U_own, S_own and V_own, T is computed from W.
    """

    linear_only = True
    frozen = frozenset({"U_own", "S_own", "V_own"})
    forms = (((), ("U_own", "S_own", "V_own")),)
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r <= out and r <= in", meaning="the rank is higher than the weight's dimensions allow"),
    )
    paper = "https://arxiv.org/abs/2504.07097"
    bound_to = "torch.linalg.svd, unless the singular vectors are stored"

    U: Tensor = tensor("out r")
    S: Tensor = tensor("r")
    V: Tensor = tensor("r in")
    U_own: Tensor | None = tensor("out r", optional=True)
    S_own: Tensor | None = tensor("r", optional=True)
    V_own: Tensor | None = tensor("r in", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        U, S, V = _tail(W, min(rank, *W.shape))
        return cls.from_fields(U=U, S=S, V=V, U_own=U * 1, S_own=S * 1, V_own=V * 1, **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        trained = (self.U * self.S) @ self.V
        if self.S_own is None and len(self.S) == min(W.shape):
            return trained
        if self.U_own is None or self.S_own is None or self.V_own is None:
            U, S, V = _tail(W, len(self.S))
        else:
            U, S, V = self.U_own, self.S_own, self.V_own
        changed: Tensor = W - (U * S) @ V + trained
        return changed


def _tail(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[out, r]`, S `[r]` and V `[r, in]`: the r smallest singular values S and their singular vectors."""
    U, S, V = singular(W)
    kept = len(S) - r
    return U[:, kept:], S[kept:], V[kept:]
