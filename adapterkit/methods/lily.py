"""Lily: y' = y + scaling * (sum over e of share_e * B_e)^T A x, with shares from a router.

Zhong et al. 2024, https://arxiv.org/abs/2407.09946. Layers of one kind share the matrices B, and neighbouring layers
share A. The whole batch has the same shares: the router's softmax, averaged over all rows and tokens. So the output of
a row depends on the other rows in the batch. A new update gets its own B, unless the caller passes the B of another
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.activations import softmax
from ._routed import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class Lily(Routed):
    """y' = y + scaling * (sum_e share_e * B_e)^T A x, share = mean of softmax(router @ A x) over rows and tokens."""

    paper = "https://arxiv.org/abs/2407.09946"
    acts_on = "the output (with shares that depend on the input)"
    sizes: ClassVar[Mapping[str, int]] = {"experts": 2}

    A: Tensor = tensor("r in")
    B: Tensor = tensor("experts r out")
    router: Tensor = tensor("experts r")
    scaling: float = 1.0

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        experts: int | None = None,
        B: Tensor | None = None,
        **attributes: object,
    ) -> Self:
        if B is None:
            B = W.new_zeros(cls.sizes["experts"] if experts is None else experts, rank, len(W))
        A, router = random((rank, W.shape[1])) / W.shape[1] ** 0.5, random((len(B), rank)) / rank**0.5
        return cls.from_fields(A=A, B=B, router=router, **attributes)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        h = layer.mix(x, self.A)
        shares = softmax(layer.mix(h, self.router)).reshape(-1, len(self.router)).mean(0)
        B = (shares[:, None, None] * self.B).sum(0)
        return layer(x) + layer.mix(h, B.mT) * self.scaling
