"""Token rows: W'[:, index] = values, the trained embeddings of some tokens and nothing else.

PEFT's trainable tokens, https://huggingface.co/docs/peft/package_reference/trainable_tokens: the stored tensor is the
new row itself, not a difference. In the view `[out, in]` of an embedding, a token is a position on the `in` axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor


class Rows(WeightUpdate):
    """W'[:, index[i]] = values[i] for every i; indices are distinct."""

    blocks = frozenset({"out", "in"})
    paper = "https://huggingface.co/docs/peft/package_reference/trainable_tokens"

    index: Tensor = tensor("n", integer=True)
    values: Tensor = tensor("n out")

    def new_weight(self, W: Tensor) -> Tensor:
        return W.index_copy(1, self.index, self.values.mT.to(W.dtype))

    def block(self, axis: str, start: int, stop: int) -> Self:
        if axis != "in":
            return super().block(axis, start, stop)
        inside = (self.index >= start) & (self.index < stop)
        return self.replace(index=self.index[inside] - start, values=self.values[inside])
