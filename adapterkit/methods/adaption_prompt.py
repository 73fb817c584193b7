"""LLaMA-Adapter: gated attention to a prompt.  Zhang et al. 2023, https://arxiv.org/abs/2303.16199

The target is an attention module. Its key and value projections are applied to the prompt P, without position encoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import ContextUpdate, tensor
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class AdaptionPrompt(ContextUpdate):
    """Adds gate * softmax(q @ k^T / sqrt(d)) @ v to each head's output; k and v are the prompt's keys and values.

    `gate` has one element for all heads, or one element per head. If `projected` is true, the term is added before the
    attention module's output projection. If `projected` is false, the term is added after this projection; PEFT does
    this for GPT-2.
    """

    place = "attention"
    acts_on = "the keys and values of the attention"
    paper = "https://arxiv.org/abs/2303.16199"

    P: Tensor = tensor("n dim")
    gate: Tensor = tensor("g")
    projected: bool = True

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return cls.from_fields(P=random((rank, len(W))), gate=W.new_zeros(1), **attributes)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        xp = namespace(q)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        out: Tensor = self.gate[:, None, None] * ((weights / weights.sum(-1)[..., None]) @ v)
        return out
