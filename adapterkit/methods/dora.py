"""DoRA: W' = magnitude * V / |V| with V = W + scaling * B @ A.  Liu et al. 2024, https://arxiv.org/abs/2402.09353

The norm is taken over all axes except `out`: for a linear layer, over a row; for a convolution, over an output
channel's kernel; for an embedding, over all tokens, separately for each dimension. Training treats the norm as a
constant, as in section 4.3 of the paper, in PEFT, and in all later training tools.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor
from ..linalg.namespace import constant, lengths

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class DoRA(WeightUpdate):
    """W' = magnitude * V / |V|, V = W + scaling * B @ A, |V| per output."""

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2402.09353"

    A: Tensor = tensor("r in *k")
    B: Tensor = tensor("out r")
    magnitude: Tensor = tensor("out")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A = random((rank, *W.shape[1:])) / math.prod(W.shape[1:]) ** 0.5
        norm = (W * W).reshape(len(W), -1).sum(1) ** 0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), magnitude=norm, **attributes)

    def normalized(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.magnitude, self.scaling * self.B, self.A.reshape(len(self.A), -1)

    def scaled_factors(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        magnitude, B, A = self.normalized()
        V = W.reshape(len(W), -1) + constant(B) @ constant(A)
        return magnitude / lengths((V * V).sum(1)), B, A

    def new_weight(self, W: Tensor) -> Tensor:
        magnitude, B, A = self.normalized()
        V = W.reshape(len(W), -1) + B @ A
        norm: Tensor = constant(lengths((V * V).sum(1)))
        return (V * (magnitude / norm)[:, None]).reshape(W.shape)
