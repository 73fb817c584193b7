"""Textual inversion: embeddings of new tokens.  Gal et al. 2022, https://arxiv.org/abs/2208.01618

The target is an embedding. The base has no rows for the new tokens, so a merge would have to add rows to the embedding
and tokens to the tokenizer. Therefore the update cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ..core.updates import ContextUpdate, tensor
from .prompt import tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class TextualInversion(ContextUpdate):
    """Row i of P is the embedding of token n + i, where n is the number of tokens in the base's vocabulary."""

    place = "vocabulary"
    acts_on = "the vocabulary of the model"
    paper = "https://arxiv.org/abs/2208.01618"

    P: Tensor = tensor("n dim")
    token: str = ""

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

    def vocabulary(self) -> Tensor:
        return self.P
