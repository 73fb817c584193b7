"""PiSSA: LoRA in the place of the base's largest singular values.  Meng et al. 2024, https://arxiv.org/abs/2404.02948

W' = W without its r largest singular values + scaling * B @ A. A file of A and B alone says no less: their product is
added to what is left of the base, and that follows from the base to the last sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..tensors.decompositions import svd
from ._in_place import InPlace

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class PiSSA(InPlace):
    """W' = W - U' S' V' + scaling * B @ A; U' S' V' are the r first components of the SVD of W."""

    paper = "https://arxiv.org/abs/2404.02948"

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        """B and A share the components that they stand for, so that nothing changes before training."""
        made = cls(A=W.new_zeros(rank, W.shape[1]), B=W.new_zeros(len(W), rank), **attributes)
        U, S, V = svd(W)
        root = (S[:rank] / made.scaling) ** 0.5
        return made.replace(A=root[:, None] * V[:rank], B=U[:, :rank] * root)

    def taken(self, W: Tensor) -> Tensor:
        r, (U, S, V) = len(self.A), svd(W)
        part: Tensor = (U[:, :r] * S[:r]) @ V[:r]
        return part
