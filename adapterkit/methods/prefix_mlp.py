"""Prefix tuning with the MLP that computes the prefix.  Li and Liang 2021, https://arxiv.org/abs/2101.00190

AdapterHub's files contain the network (`wte`, `control_trans`). PEFT's files contain the network's output, so
they are read as the method `prefix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..core.updates import ContextUpdate, tensor
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PrefixMLP(ContextUpdate):
    """Puts keys P[i, 0] and values P[i, 1] before the keys and values of layer i.

    For each prefix token, P = W2 @ tanh(W1 @ e + b1) + b2, where e is the token's row of E. W2 and b2 are the weight
    and bias of a linear layer, whose output axis is split into `layers 2 heads d`.
    """

    place = "past"
    paper = "https://arxiv.org/abs/2101.00190"

    E: Tensor = tensor("n width")
    W1: Tensor = tensor("hidden width")
    b1: Tensor = tensor("hidden")
    W2: Tensor = tensor("layers 2 heads d hidden")
    b2: Tensor = tensor("layers 2 heads d")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        sizes, width, hidden = attributes.pop("sizes"), len(W), attributes.pop("hidden", 512)
        values = sizes["layers"], 2, sizes["heads"], sizes["d"]
        return cls.from_fields(
            E=random((rank, width)),
            W1=random((hidden, width)) / width**0.5,
            b1=W.new_zeros(hidden),
            W2=random((*values, hidden)) / hidden**0.5,
            b2=W.new_zeros(values),
            **attributes,
        )

    def past(self) -> Tensor:
        return self.computed()

    def computed(self) -> Tensor:
        """Return the network's output: keys and values `[layers, 2, heads, n, d]`."""
        xp = namespace(self.E)
        h = xp.tanh(self.E @ self.W1.mT + self.b1)
        P = h @ self.W2.reshape(-1, h.shape[-1]).mT + self.b2.reshape(-1)
        out: Tensor = xp.permute_dims(P.reshape(-1, *self.b2.shape), (1, 2, 3, 0, 4))
        return out
