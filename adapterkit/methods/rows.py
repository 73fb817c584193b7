"""Token rows: W'[:, index] = values, new embeddings for some tokens.

PEFT calls this method "trainable tokens": https://huggingface.co/docs/peft/package_reference/trainable_tokens. The
tensor `values` contains the new rows, not differences. In adapterkit, every update gets the weight with the axes
`[out, in]`. For an embedding, these are `[dim, vocabulary]`, so a token id is an index on the axis `in`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor
from ..errors import ShapeMismatch, UsageError
from ..linalg.namespace import namespace, summed
from ..linalg.positions import outside

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Rows(WeightUpdate):
    """W'[:, index[i]] = values[i] for every i; indices are distinct."""

    linear_only = True
    shared_as = "rows"
    blocks = frozenset({"out", "in"})
    paper = "https://huggingface.co/docs/peft/package_reference/trainable_tokens"

    index: Tensor = tensor("n", integer=True, below="in", distinct=True)
    values: Tensor = tensor("n out")

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
        if index is None:
            raise UsageError("the token ids are missing", where="index", cure="Pass index=[token_id, ...]")
        return cls.from_fields(index=W.new_tensor(index).long(), values=W[:, list(index)].mT, **attributes)

    def check_against(self, shape: tuple[int, ...]) -> None:
        worst = outside(self.index, shape[1:2])
        if worst is not None:
            why = f"the adapter changes token {worst}; the base has {shape[1]} tokens"
            raise ShapeMismatch(why, cure="Resize the base's embeddings first")
        super().check_against(shape)

    @classmethod
    def mixed(  # pyright: ignore[reportIncompatibleMethodOverride] - all updates have the class of `cls`
        cls, updates: Sequence[Self], weights: Sequence[float]
    ) -> Self | None:
        """Return the weighted sum of the updates as one update, or None if this is not possible.

        The sum is possible only in two cases. Either all updates have the same tokens and the weights sum to 1, or no
        two updates share a token and all weights are 1.
        """
        tokens = [update.index.tolist() for update in updates]
        if any(len(update.index.shape) > 1 for update in updates):
            return None
        if all(weight == 1 for weight in weights) and len(set().union(*tokens)) == sum(map(len, tokens)):
            xp = namespace(updates[0].values)
            return cls(index=xp.concat([u.index for u in updates]), values=xp.concat([u.values for u in updates]))
        if not math.isclose(sum(weights), 1) or any(set(each) != set(tokens[0]) for each in tokens):
            return None
        orders = [[each.index(token) for token in tokens[0]] for each in tokens]
        terms = (w * u.values[order] for w, u, order in zip(weights, updates, orders, strict=True))
        return cls(index=updates[0].index, values=summed(terms))

    def new_weight(self, W: Tensor) -> Tensor:
        changed = W * 1
        changed[:, self.index.tolist()] = self.values.mT
        return changed

    def block(self, axis: str, start: int, stop: int) -> Self:
        if axis != "in":
            return super().block(axis, start, stop)
        inside = (self.index >= start) & (self.index < stop)
        return self.replace(index=self.index[inside] - start, values=self.values[inside])
