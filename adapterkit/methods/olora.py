"""OLoRA: LoRA that replaces a part of the base's QR decomposition.  Buyukakyuz 2024, https://arxiv.org/abs/2406.01775

W' = W - scaling * Q' R' + scaling * B @ A. Given the thin QR decomposition W = Q R, Q' consists of the first r columns
of Q, and R' consists of the first r rows of R. A file with only A and B is complete, because Q' R' can be computed
exactly from the base. The signs of Q's columns depend on the library, but R's rows have matching signs, so the product
Q' R' is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule
from ._in_place import InPlace, qr

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class OLoRA(InPlace):
    """W' = W + scaling * (B @ A - Q' R'), with Q' = Q[:, :r] and R' = R[:r] from the QR decomposition W = Q R."""

    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r <= out and r <= in", meaning="the rank is higher than the weight's dimensions allow"),
    )
    paper = "https://arxiv.org/abs/2406.01775"

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with B = Q' and A = R', so that nothing changes before training."""
        Q, R = qr(W)
        return cls.from_fields(A=R[:rank] * 1, B=Q[:, :rank] * 1, **attributes)

    def taken(self, W: Tensor) -> Tensor:
        r, (Q, R) = len(self.A), qr(W)
        part: Tensor = self.scaling * Q[:, :r] @ R[:r]
        return part
