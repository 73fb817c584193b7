"""PEANuT: W' = W + scaling * B @ f(... f(A @ W)), a network on the weight.

Zhong et al. 2024, https://arxiv.org/abs/2410.01870

The network maps each column of W (the weights of one input) to the change of this column. First, A and f reduce the
column to r values. Encoders and decoders of width r follow; the input of each encoder is added to the output of the
corresponding decoder. B maps the r values to the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import WeightUpdate, attribute, tensor
from ..linalg.activations import ACTIVATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PEANuT(WeightUpdate):
    """W' = W + scaling * B @ h.

    First h = f(A @ W), then h = f(encoder @ h) for each encoder. Then h = f(decoder @ h) + x for each decoder, where x
    is the input of the matching encoder. The first decoder matches the last encoder, and so on in reverse order.
    """

    linear_only = True
    blocks = frozenset({"in"})
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ((("encoders", "decoders"), ()),)
    paper = "https://arxiv.org/abs/2410.01870"

    A: Tensor = tensor("r out")
    B: Tensor = tensor("out r")
    encoders: Tensor | None = tensor("n r r", optional=True)
    decoders: Tensor | None = tensor("n r r", optional=True)
    activation: str = attribute("relu", among=ACTIVATIONS)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Start with one encoder, one decoder, and B = 0."""
        A, inner = random((rank, len(W))) / len(W) ** 0.5, (1, rank, rank)
        encoders, decoders = random(inner) / rank**0.5, random(inner) / rank**0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), encoders=encoders, decoders=decoders, **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        f = ACTIVATIONS[self.activation]
        h = f(self.A @ W)
        inputs: list[Tensor] = []
        for encoder in () if self.encoders is None else self.encoders:
            inputs.append(h)
            h = f(encoder @ h)
        for decoder in () if self.decoders is None else self.decoders:
            h = f(decoder @ h) + inputs.pop()
        new: Tensor = W + (self.scaling * self.B) @ h
        return new
