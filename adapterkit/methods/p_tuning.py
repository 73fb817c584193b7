"""P-tuning: a prompt computed by a small network.  Liu et al. 2021, https://arxiv.org/abs/2103.10385

PEFT's files store the output of the network instead of the network, so they are read as the method `prompt`.
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


class PTuning(ContextUpdate):
    """Puts MLP(E) in front of the embeddings of the input; the MLP is three linear layers with ReLUs between them."""

    place = "embeddings"
    paper = "https://arxiv.org/abs/2103.10385"

    E: Tensor = tensor("n width")
    W1: Tensor = tensor("hidden width")
    b1: Tensor = tensor("hidden")
    W2: Tensor = tensor("hidden hidden")
    b2: Tensor = tensor("hidden")
    W3: Tensor = tensor("dim hidden")
    b3: Tensor = tensor("dim")

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        hidden: int | None = None,
        index: Sequence[int] | None = None,
        **attributes: object,
    ) -> Self:
        dim, hidden = len(W), len(W) if hidden is None else hidden
        return cls.from_fields(
            E=tokens_of(W, rank, random, index),
            W1=random((hidden, dim)) / dim**0.5,
            b1=W.new_zeros(hidden),
            W2=random((hidden, hidden)) / hidden**0.5,
            b2=W.new_zeros(hidden),
            W3=random((dim, hidden)) / hidden**0.5,
            b3=W.new_zeros(dim),
            **attributes,
        )

    def embeddings(self, task: Tensor | int | None = None) -> Tensor:
        xp = namespace(self.E)
        h = self.E @ self.W1.mT + self.b1
        h = xp.where(h > 0, h, 0 * h) @ self.W2.mT + self.b2
        out: Tensor = xp.where(h > 0, h, 0 * h) @ self.W3.mT + self.b3
        return out
