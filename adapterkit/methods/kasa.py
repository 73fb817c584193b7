"""KaSA: LoRA in the place of the base's smallest singular values.  Wang et al. 2024, https://arxiv.org/abs/2412.06071

W' = W without its r smallest singular values + scaling * B @ diag @ A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import ShapeMismatch
from ..tensors.decompositions import svd
from ..updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class KaSA(WeightUpdate):
    """W' = W - U' S' V' + scaling * (B * diag) @ A; U' S' V' are the r last components of the SVD of W."""

    linear_only = True
    starts_at_base: ClassVar[bool] = False
    paper = "https://arxiv.org/abs/2412.06071"

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    diag: Tensor = tensor("r")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        """B is zero; what is cut off W is gone from the start, as the method has it."""
        A = random((rank, W.shape[1])) / W.shape[1] ** 0.5
        return cls(A=A, B=W.new_zeros(len(W), rank), diag=random((rank,)), **attributes)

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.A.shape[-2] >= min(shape):
            why = f"rank {self.A.shape[-2]} leaves nothing of a weight of {list(shape)}"
            raise ShapeMismatch(why, where="A", cure="The rank must be below both sizes")

    def new_weight(self, W: Tensor) -> Tensor:
        kept = min(W.shape) - len(self.A)
        U, S, V = svd(W)
        new: Tensor = W - (U[:, kept:] * S[kept:]) @ V[kept:] + (self.scaling * self.B * self.diag) @ self.A
        return new
