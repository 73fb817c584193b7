"""OLoRA: LoRA in the place of the first rows of the base's QR.  Buyukakyuz 2024, https://arxiv.org/abs/2406.01775

W' = W - scaling * Q' R' + scaling * B @ A, of the thin QR decomposition W = Q R the first r columns and rows. A file of
A and B alone says no less: the product Q' R' follows from the base to the last sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..errors import ShapeMismatch
from ..tensors.decompositions import qr
from ..updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class OLoRA(WeightUpdate):
    """W' = W + scaling * (B @ A - Q' R'); Q' and R' are the first r columns of Q and rows of R in W = Q R."""

    linear_only = True
    paper = "https://arxiv.org/abs/2406.01775"

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        """B and A are Q' and R', so that nothing changes before training."""
        Q, R = qr(W)
        return cls(A=R[:rank] * 1, B=Q[:, :rank] * 1, **attributes)

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.A.shape[-2] > min(shape):
            why = f"rank {self.A.shape[-2]} of a weight of {list(shape)}"
            raise ShapeMismatch(why, where="A", cure="The adapter is not of this base")

    def new_weight(self, W: Tensor) -> Tensor:
        r, (Q, R) = len(self.A), qr(W)
        new: Tensor = W + self.scaling * (self.B @ self.A - Q[:, :r] @ R[:r])
        return new
