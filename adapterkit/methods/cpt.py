"""Context-aware prompt tuning: a bounded change of the embeddings of example tokens.

Blau et al. 2024, https://arxiv.org/abs/2410.17222

PEFT's CPT files store only the sum of the embeddings and the change. So these files are read as the method `prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ..core.updates import ContextUpdate, tensor
from ..linalg.namespace import namespace
from .prompt import tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class CPT(ContextUpdate):
    """Puts E + D * min(1, epsilon / |D|) in front of the input's embeddings; |D| is the norm of each token's row."""

    place = "embeddings"
    frozen = frozenset({"E", "epsilon"})
    paper = "https://arxiv.org/abs/2410.17222"

    E: Tensor = tensor("n dim")
    D: Tensor = tensor("n dim")
    epsilon: Tensor = tensor("n")

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        index: Sequence[int] | None = None,
        bound: float = 0.1,
        **attributes: object,
    ) -> Self:
        E = tokens_of(W, rank, random, index)
        bound = bound * (len(W) / 2048) ** 0.5
        return cls.from_fields(E=E, D=E * 0, epsilon=W.new_full((rank,), bound), **attributes)

    def embeddings(self, task: Tensor | int | None = None) -> Tensor:
        xp = namespace(self.E)
        square = (self.D * self.D).sum(1)
        # Compute a norm only for tokens whose change exceeds the bound, because a norm has no derivative at 0.
        inside = square <= self.epsilon * self.epsilon
        norm = xp.where(inside, self.epsilon * 0 + 1, square) ** 0.5
        kept: Tensor = xp.where(inside, norm * 0 + 1, self.epsilon / norm)
        return self.E + self.D * kept[:, None]
