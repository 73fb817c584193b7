"""KaSA: LoRA in place of the base's smallest singular values.  Wang et al. 2024, https://arxiv.org/abs/2412.06071

W' = (W without its r smallest singular values) + scaling * (B * diag) @ A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, tensor
from ._in_place import InPlace, svd

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class KaSA(InPlace):
    """W' = W - U' S' V' + scaling * (B * diag) @ A; U' S' V' are the last r components of the SVD of W."""

    starts_at_base: ClassVar[bool] = False
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r < out and r < in", meaning="the rank must be smaller than both dimensions of the weight"),
    )
    paper = "https://arxiv.org/abs/2412.06071"

    diag: Tensor = tensor("r")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with B = 0.

        W' differs from W even before training, because the update removes W's smallest singular values, as in the
        paper.
        """
        A = random((rank, W.shape[1])) / W.shape[1] ** 0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), diag=random((rank,)), **attributes)

    def taken(self, W: Tensor) -> Tensor:
        kept, (U, S, V) = min(W.shape) - len(self.A), svd(W)
        part: Tensor = (U[:, kept:] * S[kept:]) @ V[kept:]
        return part

    def left(self) -> Tensor:
        return self.B * self.diag
