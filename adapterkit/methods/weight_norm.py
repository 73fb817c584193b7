"""Weight normalisation: W' = magnitude * W / |W|, with one norm per output or per input.

Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868. In LyCORIS, DoRA
(https://arxiv.org/abs/2402.09353) is a LoHa, LoKr or LoRA, followed by weight normalisation of the same target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import WeightUpdate, tensor
from ..linalg.namespace import lengths

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class WeightNorm(WeightUpdate):
    """W'[o] = out[o] * W[o] / (|W[o]| + eps), or W'[:, i] = into[i] * W[:, i] / (|W[:, i]| + eps)."""

    blocks = frozenset({"out", "in"})
    paper = "https://arxiv.org/abs/1602.07868"
    since: ClassVar[tuple[str, ...]] = ("1.1",)
    forms = ((("out",), ("into",)),)

    out: Tensor | None = tensor("out", optional=True)
    into: Tensor | None = tensor("in", optional=True)
    eps: float = 0.0

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, eps: float = 0.0, **attributes: object
    ) -> Self:
        norm = (W * W).reshape(len(W), -1).sum(1) ** 0.5
        return cls.from_fields(out=norm + eps, eps=eps, **attributes)

    def cuts(self, axis: str) -> bool:
        """Return whether the update can be split along `axis`: True only for the axis of the stored norms."""
        return axis == ("out" if self.into is None else "in")

    def new_weight(self, W: Tensor) -> Tensor:
        if self.into is None:
            norm = lengths((W * W).reshape(len(W), -1).sum(1))
            assert self.out is not None
            factors = self.out / (norm + self.eps)
            return W * factors.reshape(-1, *[1] * (W.ndim - 1))
        norm = lengths((W * W).reshape(len(W), W.shape[1], -1).sum(2).sum(0))
        factors = self.into / (norm + self.eps)
        return W * factors.reshape(1, -1, *[1] * (W.ndim - 2))
