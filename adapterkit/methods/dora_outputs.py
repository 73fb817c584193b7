"""DoRA on outputs, as AdapterHub trains it: y' = magnitude / |W + B @ A| * (y + scaling * B @ A @ x).

The formula differs from Liu et al. 2024, https://arxiv.org/abs/2402.09353, in two ways: the norm omits the scaling, and
the quotient magnitude / norm multiplies the layer's whole output, including the bias.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import WeightUpdate, tensor
from ..errors import UsageError
from ..linalg.namespace import lengths
from .dora import DoRA

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random, Update


class DoRAOutputs(WeightUpdate):
    """W' = f * (W + scaling * B @ A), b' = f * b, f = magnitude / |W + B @ A| per output."""

    blocks = frozenset({"out"})
    bias_sees_weight: ClassVar[bool] = True
    needs_bias = False
    paper = "https://arxiv.org/abs/2402.09353"
    since: ClassVar[tuple[str, ...]] = ("1.1",)

    A: Tensor = tensor("r in *k")
    B: Tensor = tensor("out r")
    magnitude: Tensor = tensor("out")
    factors: Tensor | None = tensor("out", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A = random((rank, *W.shape[1:])) / math.prod(W.shape[1:]) ** 0.5
        norm = (W * W).reshape(len(W), -1).sum(1) ** 0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), magnitude=norm, **attributes)

    def without_bias(self) -> Update:
        if self.scaling != 1 or self.factors is not None:
            return self
        return DoRA(A=self.A, B=self.B, magnitude=self.magnitude)

    @property
    def changes_bias(self) -> bool:
        return True

    def new_weight(self, W: Tensor) -> Tensor:
        factors = self.settled(W).factors
        assert factors is not None
        V = W.reshape(len(W), -1) + (self.scaling * self.B) @ self.A.reshape(len(self.A), -1)
        return (V * factors[:, None]).reshape(W.shape)

    def settled(self, W: Tensor) -> Self:
        if self.factors is not None:
            return self
        V = W.reshape(len(W), -1) + self.B @ self.A.reshape(len(self.A), -1)
        return self.replace(factors=self.magnitude / lengths((V * V).sum(1)))

    def new_bias(self, b: Tensor) -> Tensor:
        if self.factors is None:
            raise UsageError("the factors on the bias depend on the weight", cure="Call settled(W) first")
        return b * self.factors
