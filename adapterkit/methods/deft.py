"""DEFT: W' = (I - Q right^T) W + scaling * Q R.  NeurIPS 2025, https://huggingface.co/docs/peft/package_reference/deft

DEFT removes a subspace of the outputs from W, and replaces it with Q R. There are two forms. In the first, Q is the
orthonormal factor of P's QR decomposition, and `right` equals Q. In the second, Q is P, and `right` is relu(P). If R is
absent, the update only removes the subspace; this is the method PaRa.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, tensor
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class DEFT(WeightUpdate):
    """W' = W + Q @ (scaling * R - right^T @ W).

    If `orthogonal` is true, Q and `right` are both the orthonormal factor of P's QR decomposition. Otherwise, Q is P,
    and `right` is relu(P).
    """

    linear_only = True
    blocks = frozenset({"in"})
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r <= out", meaning="the subspace has more dimensions than there are outputs"),
    )
    paper = "https://huggingface.co/docs/peft/package_reference/deft"

    P: Tensor = tensor("out r")
    R: Tensor | None = tensor("r in", optional=True)
    orthogonal: bool = True
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with R = right^T @ W / scaling. This R restores the removed part, so W does not change at first."""
        update = cls.from_fields(P=random((len(W), min(rank, len(W)))) / 50, **attributes)
        _, right = update._projection()
        return update.replace(R=right.mT @ W / update.scaling)

    def new_weight(self, W: Tensor) -> Tensor:
        Q, right = self._projection()
        removed = right.mT @ W
        new: Tensor = W + Q @ ((0 if self.R is None else self.scaling * self.R) - removed)
        return new

    def _projection(self) -> tuple[Tensor, Tensor]:
        xp = namespace(self.P)
        if not self.orthogonal:
            return self.P, self.P * (self.P > 0)
        half = self.P.dtype not in (xp.float32, xp.float64)
        Q = xp.linalg.qr(xp.astype(self.P, xp.float32) if half else self.P)[0]
        Q = xp.astype(Q, self.P.dtype)
        return Q, Q
