"""VB-LoRA: LoRA whose factors are composed from a shared bank of vectors.  Li et al. 2024, arXiv:2405.15179

Every `b` consecutive elements of a factor are a mixture of vectors in the bank. In training, the vectors with the
`topk` largest logits are mixed, weighted by a softmax over these logits. After training, `indices` and `weights` are
stored instead of the logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import attribute, tensor
from ..linalg.namespace import namespace
from ._low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..core.updates import Random


class VBLoRA(LowRank):
    """W' = W + B @ A; both factors consist of mixtures of the bank's vectors."""

    linear_only = True
    paper = "https://arxiv.org/abs/2405.15179"
    starts_at_base = False
    forms = ((("logits_A", "logits_B"), ("indices_A", "weights_A", "indices_B", "weights_B")),)

    bank: Tensor = tensor("n b")
    logits_A: Tensor | None = tensor("r in/b n", optional=True)
    logits_B: Tensor | None = tensor("out/b r n", optional=True)
    indices_A: Tensor | None = tensor("r in/b m", optional=True, integer=True, below="n")
    weights_A: Tensor | None = tensor("r in/b m", optional=True)
    indices_B: Tensor | None = tensor("out/b r m", optional=True, integer=True, below="n")
    weights_B: Tensor | None = tensor("out/b r m", optional=True)
    topk: int = attribute(2, least=1)

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        common = math.gcd(*(size for shape in shapes for size in shape))
        length = max(n for n in range(1, min(256, common) + 1) if common % n == 0)
        return {"bank": 0.02 * random((256, length))}

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, bank: Tensor | None = None, **attributes: object
    ) -> Self:
        shared = cls.shared([tuple(W.shape)], rank, random)
        bank = shared["bank"] if bank is None else bank
        count, length = bank.shape
        A, B = (rank, W.shape[1] // length, count), (W.shape[0] // length, rank, count)
        return cls.from_fields(**{"bank": bank, "logits_A": random(A) / 6, "logits_B": random(B) / 6, **attributes})

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A = self._mixed(self.logits_A, self.indices_A, self.weights_A)
        B = self._mixed(self.logits_B, self.indices_B, self.weights_B).swapaxes(1, 2)
        return B.reshape(-1, B.shape[2]), A.reshape(A.shape[0], -1)

    def _mixed(self, logits: Tensor | None, indices: Tensor | None, weights: Tensor | None) -> Tensor:
        """Return mixtures of the bank's vectors. Either `logits` or both `indices` and `weights` are given.

        The result has the same axes as the arguments, but its last axis has length `b`.
        """
        xp = namespace(self.bank)
        if logits is not None:
            indices = xp.argsort(logits, axis=-1, descending=True)[..., : self.topk]
            kept = xp.take_along_axis(logits, indices, axis=-1)
            weights = xp.exp(kept - kept[..., :1])
            weights = weights / weights.sum(-1)[..., None]
        assert indices is not None
        assert weights is not None
        return (weights[..., None] * self.bank[xp.astype(indices, xp.int64)]).sum(-2)
