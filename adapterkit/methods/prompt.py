"""Prompt tuning: trained embeddings in front of the input's.  Lester et al. 2021, https://arxiv.org/abs/2104.08691

The formula also covers P-tuning and CPT, if what computes their embeddings is no longer needed, as in PEFT's files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import ContextUpdate, Rule, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Prompt(ContextUpdate):
    """Puts the first `used` rows of P, or all if it is 0, in front of the embeddings of the input."""

    place = "embeddings"
    paper = "https://arxiv.org/abs/2104.08691"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="0 <= used and used <= n",
            where="used",
            error="Malformed",
            meaning="more tokens are used than there are",
        ),
    )

    P: Tensor = tensor("n dim")
    used: int = 0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        return cls(P=tokens_of(W, rank, random, attributes.pop("index", None)), **attributes)

    def embeddings(self, task: Any = None) -> Tensor:
        return self.P[: self.used] if self.used else self.P


def tokens_of(W: Tensor, count: int, random: Random, index: Any) -> Tensor:
    """Return initial embeddings `[count, dim]`: those of given tokens, repeated, or of randomly drawn tokens.

    Args:
        W: the embedding's weight, `[dim, vocabulary]`.
        count: how many.
        random: shape -> numbers from -1 to 1.
        index: token numbers, or None.
    """
    if index is None:
        drawn = ((random((count,)) + 1) / 2 * W.shape[1]).tolist()
        index = [min(int(token), W.shape[1] - 1) for token in drawn]
    return W[:, [index[position % len(index)] for position in range(count)]].mT
