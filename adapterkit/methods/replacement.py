"""Replacement: W' = weight, b' = bias, for whole parameters that were trained together with an adapter.

The method covers PEFT's `modules_to_save` and `bias="all"`, LN tuning (https://arxiv.org/abs/2312.11420), and the
biases of BitFit (https://arxiv.org/abs/2106.10199).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from ..core.updates import WeightUpdate, tensor
from ..errors import UsageError
from ..linalg.namespace import summed

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Replacement(WeightUpdate):
    """W' = weight, b' = bias. One of them may be absent: without `weight`, W' = W; without `bias`, b' = b."""

    blocks = frozenset({"out"})
    shared_as = "replacement"
    paper = "https://huggingface.co/docs/peft/developer_guides/checkpoint"

    weight: Tensor | None = tensor("out *rest", optional=True)
    bias: Tensor | None = tensor("out", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with copies of W and b.

        `weight=False` omits the weight, as in BitFit, which trains only biases. `bias=False` omits the bias.
        """
        values = {"weight": W, "bias": b}
        wanted = {name: leaf for name, leaf in values.items() if attributes.pop(name, True) is not False}
        if not any(leaf is not None for leaf in wanted.values()):
            why = "the target has none of the parameters to replace"
            raise UsageError(why, where="bias", cure="Choose targets that have a bias, or omit weight=False")
        return cls.from_fields(**wanted, **attributes)

    @classmethod
    def mixed(  # pyright: ignore[reportIncompatibleMethodOverride] - all updates have the class of `cls`
        cls, updates: Sequence[Self], weights: Sequence[float]
    ) -> Self | None:
        """Return the weighted sum of the updates as one replacement, or None if this is not possible.

        The weights must sum to 1, because otherwise the result would depend on W. All updates must replace
        the same parameters.
        """
        tensors_of: list[Mapping[str, Any]] = [update.tensors for update in updates]
        if not math.isclose(sum(weights), 1) or any(tensors.keys() != tensors_of[0].keys() for tensors in tensors_of):
            return None
        pairs = list(zip(weights, tensors_of, strict=True))
        return cls(**{name: summed(w * leaves[name] for w, leaves in pairs) for name in tensors_of[0]})

    @property
    def changes_weight(self) -> bool:
        return self.weight is not None

    @property
    def changes_bias(self) -> bool:
        return self.bias is not None

    def new_weight(self, W: Tensor) -> Tensor:
        return W if self.weight is None else self.weight.reshape(W.shape)

    def new_bias(self, b: Tensor) -> Tensor:
        return b if self.bias is None else self.bias
