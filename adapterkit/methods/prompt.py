"""Prompt tuning: trained embeddings before the embeddings of the input.

Lester et al. 2021, https://arxiv.org/abs/2104.08691

The formula also covers P-tuning and CPT if the file stores the final embeddings, as PEFT's files do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import ContextUpdate, Rule, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Prompt(ContextUpdate):
    """Puts the first `used` rows of P in front of the embeddings of the input; 0 means all rows."""

    place = "embeddings"
    paper = "https://arxiv.org/abs/2104.08691"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="0 <= used and used <= n",
            where="used",
            error="Malformed",
            meaning="used is not between 0 and the number of rows of P",
        ),
    )

    P: Tensor = tensor("n dim")
    used: int = 0

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        index: Sequence[int] | None = None,
        **attributes: object,
    ) -> Self:
        return cls.from_fields(P=tokens_of(W, rank, random, index), **attributes)

    def embeddings(self, task: Tensor | int | None = None) -> Tensor:
        return self.P[: self.used] if self.used else self.P


def tokens_of(W: Tensor, count: int, random: Random, index: Sequence[int] | None) -> Tensor:
    """Return initial embeddings `[count, dim]`: copies of the embeddings of the tokens in `index`, or of random tokens.

    Args:
        W: the embedding's weight, `[dim, vocabulary]`.
        count: the number of embeddings.
        random: a function from a shape to random numbers between -1 and 1.
        index: token ids, repeated if there are fewer ids than `count`. If None, tokens are drawn at random.
    """
    if index is None:
        drawn = ((random((count,)) + 1) / 2 * W.shape[1]).tolist()
        index = [min(int(token), W.shape[1] - 1) for token in drawn]
    return W[:, [index[position % len(index)] for position in range(count)]].mT
