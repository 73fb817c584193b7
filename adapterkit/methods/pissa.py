"""PiSSA: LoRA in place of the base's largest singular values.  Meng et al. 2024, https://arxiv.org/abs/2404.02948

W' = (W without its r largest singular values) + scaling * B @ A. A file with only A and B is complete, because the
removed part of W can be computed exactly from the base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule
from ._in_place import InPlace, svd

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PiSSA(InPlace):
    """W' = W - U' S' V' + scaling * B @ A; U' S' V' are the first r components of the SVD of W."""

    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r <= out and r <= in", meaning="the rank is higher than the weight's dimensions allow"),
    )
    paper = "https://arxiv.org/abs/2404.02948"

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with the removed components as B and A, so that nothing changes before training."""
        update = cls.from_fields(A=W.new_zeros(rank, W.shape[1]), B=W.new_zeros(len(W), rank), **attributes)
        U, S, V = svd(W)
        root = (S[:rank] / update.scaling) ** 0.5
        return update.replace(A=root[:, None] * V[:rank], B=U[:, :rank] * root)

    def taken(self, W: Tensor) -> Tensor:
        r, (U, S, V) = len(self.A), svd(W)
        part: Tensor = (U[:, :r] * S[:r]) @ V[:r]
        return part
