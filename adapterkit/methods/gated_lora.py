"""LoRA with a gate: y' = y + mean(sigmoid(gate x)) * B @ A x; the mean is over a row's positions.

Mao et al. 2021, https://arxiv.org/abs/2110.07577. The gate replaces the scaling. The gate reads the input, so the
change cannot be written as a change of the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import OutputUpdate, tensor
from ._bottleneck import row_shares

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class GatedLoRA(OutputUpdate):
    """y' = y + share * B @ A x, with one share for each row of a batch `[rows, ..., in]`."""

    linear_only = True
    paper = "https://arxiv.org/abs/2110.07577"

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    gate: Tensor = tensor("1 in")
    gate_bias: Tensor = tensor("1")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A, gate = (random((count, W.shape[1])) / W.shape[1] ** 0.5 for count in (rank, 1))
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), gate=gate, gate_bias=W.new_zeros(1), **attributes)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        shares: Tensor = row_shares(x @ self.gate.mT + self.gate_bias)
        return layer(x) + x @ self.A.mT @ self.B.mT * shares
