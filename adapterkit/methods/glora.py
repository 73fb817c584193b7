"""GLoRA: W' = W + W * A + B, b' = b + b * D + E + W @ C.  Chavan et al. 2023, https://arxiv.org/abs/2306.07967

A, B, C, D and E are called supports. In training, a search selects the form of each support: a product of two factors,
a vector, or a constant. The search may also omit a support. The tensors' names show the form: for example, A_d and A_u
are the two factors of A, A without a suffix is a vector, and A_c is a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self, cast

from ..core.updates import WeightUpdate, tensor
from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class GLoRA(WeightUpdate):
    """W' = W + W * A + B, b' = b + b * D + E + W @ C.

    At least one support is present. Each support that is present has exactly one of its forms.
    """

    linear_only = True
    blocks = frozenset({"out", "in"})
    bias_sees_weight: ClassVar[bool] = True
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        *(((f"{name}_d", f"{name}_u"), (name,), (f"{name}_c",), ()) for name in "AB"),
        (("C_d", "C_u"), ("C",), ()),
        *(((name,), (f"{name}_c",), ()) for name in "DE"),
    )
    paper = "https://arxiv.org/abs/2306.07967"

    A_d: Tensor | None = tensor("out r", optional=True)
    A_u: Tensor | None = tensor("r in", optional=True)
    A: Tensor | None = tensor("out", optional=True)
    A_c: Tensor | None = tensor("1", optional=True)
    B_d: Tensor | None = tensor("out r", optional=True)
    B_u: Tensor | None = tensor("r in", optional=True)
    B: Tensor | None = tensor("out", optional=True)
    B_c: Tensor | None = tensor("1", optional=True)
    C_d: Tensor | None = tensor("in r", optional=True)
    C_u: Tensor | None = tensor("r 1", optional=True)
    C: Tensor | None = tensor("in", optional=True)
    D: Tensor | None = tensor("out", optional=True)
    D_c: Tensor | None = tensor("1", optional=True)
    E: Tensor | None = tensor("out", optional=True)
    E_c: Tensor | None = tensor("1", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        out, in_ = W.shape
        fields = {f"{name}_d": W.new_zeros(out, rank) for name in "AB"}
        fields |= {f"{name}_u": random((rank, in_)) / in_**0.5 for name in "AB"}
        if b is not None:
            fields |= {"C_d": W.new_zeros(in_, rank), "C_u": random((rank, 1)), "D": 0 * b, "E": 0 * b}
        return cls.from_fields(**fields, **attributes)

    @property
    def changes_weight(self) -> bool:
        return self._holds("AB")

    @property
    def changes_bias(self) -> bool:
        return self._holds("CDE")

    def new_weight(self, W: Tensor) -> Tensor:
        return W + W * self._support("A") + self._support("B")

    def settled(self, W: Tensor) -> Self:
        if not self._holds("C"):
            return self
        E = (W @ self._support("C"))[..., 0] + self._support("E")
        return self.replace(C_d=None, C_u=None, C=None, E=E, E_c=None)

    def new_bias(self, b: Tensor) -> Tensor:
        if self._holds("C"):
            raise UsageError("GLoRA's new bias depends on W, because C is present", cure="Call settled(W) first")
        return b + b * self._support("D") + self._support("E")

    def _holds(self, supports: str) -> bool:
        return any(name[0] in supports for name in self.tensors)

    def _support(self, name: str) -> Tensor:
        """Return the support `name`; 0 if it is absent. A, B and C are matrices or columns; D and E are vectors."""
        leaves = [cast("Tensor", leaf) for field, leaf in self.tensors.items() if field[0] == name]
        vectors = leaves if name in "DE" else [leaf[..., None] for leaf in leaves]
        return leaves[0] @ leaves[1] if len(leaves) == 2 else cast("Tensor", sum(vectors))
