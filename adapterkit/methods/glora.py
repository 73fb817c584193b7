"""GLoRA: W' = W + W * A + B, b' = b + b * D + E + W @ C.  Chavan et al. 2023, https://arxiv.org/abs/2306.07967

Each of the five supports is a product of two factors (d, u), a vector, a constant or nothing, as was searched for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import Malformed, UsageError
from ..updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class GLoRA(WeightUpdate):
    """W' = W + W * A + B, b' = b + b * D + E + W @ C; each support in one form at most, and not all absent."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    bias_sees_weight: ClassVar[bool] = True
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        (("A_d", "A_u"), ("A",), ("A_c",), ()),
        (("B_d", "B_u"), ("B",), ("B_c",), ()),
        (("C_d", "C_u"), ("C",), ()),
        (("D",), ("D_c",), ()),
        (("E",), ("E_c",), ()),
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
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        out, in_ = W.shape
        fields = {f"{name}_d": W.new_zeros(out, rank) for name in "AB"}
        fields |= {f"{name}_u": random((rank, in_)) / in_**0.5 for name in "AB"}
        if b is not None:
            fields |= {"C_d": W.new_zeros(in_, rank), "C_u": random((rank, 1)), "D": 0 * b, "E": 0 * b}
        return cls(**fields, **attributes)

    def check(self) -> None:
        super().check()
        if not self.tensors:
            raise Malformed("holds no support", cure="Write the adapter again")

    @property
    def changes_weight(self) -> bool:
        return any(name[0] in "AB" for name in self.tensors)

    @property
    def changes_bias(self) -> bool:
        return any(name[0] in "CDE" for name in self.tensors)

    def new_weight(self, W: Tensor) -> Tensor:
        A, B = self._support("A", column=True), self._support("B", column=True)
        new: Tensor = W + W * A + B
        return new

    def settled(self, W: Tensor) -> Self:
        C = self.C if self.C_d is None or self.C_u is None else (self.C_d @ self.C_u)[..., 0]
        if C is None:
            return self
        return self.replace(C_d=None, C_u=None, C=None, E=(W @ C[..., None])[..., 0] + self._support("E"), E_c=None)

    def new_bias(self, b: Tensor) -> Tensor:
        if self.C is not None or self.C_d is not None:
            raise UsageError("GLoRA's C needs the weight", cure="Call settled(W) first")
        new: Tensor = b + b * self._support("D") + self._support("E")
        return new

    def _support(self, name: str, column: bool = False) -> Any:
        d, u, vector, constant = (getattr(self, name + form, None) for form in ("_d", "_u", "", "_c"))
        if d is not None:
            return d @ u
        if vector is not None:
            return vector[:, None] if column else vector
        return 0.0 if constant is None else constant
