"""PSOFT: a rotation in the principal subspace of W.  Wu et al. 2025, https://openreview.net/forum?id=FSHrinMArK

W' = W + B (R - I) A, where B @ A is the part of W with its r largest singular values. By default, A = V^T and B = U S.
If `symmetric` is set, A = sqrt(S) V^T and B = U sqrt(S). PEFT stores only R, and computes A and B from the base. The
formula depends on the signs of the singular vectors, which depend on the library. So if A and B are not stored,
adapterkit computes them as PEFT does: with torch's SVD in float32 on the CPU or, if `steps` is set, with torch's
randomised SVD. Adapters that adapterkit creates store A and B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, attribute, tensor
from ..linalg.rotations import cayley, identity, neumann, shortened, singular, singular_by_sketch, skew

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PSOFT(WeightUpdate):
    """W' = W + B @ (diag(b) @ R @ diag(a) - I) @ A; R is a rotation computed from `pairs`, or any stored matrix."""

    linear_only = True
    frozen = frozenset({"A", "B"})
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="r <= out and r <= in", meaning="the rank is higher than the weight's dimensions allow"),
    )
    paper = "https://openreview.net/forum?id=FSHrinMArK"
    bound_to = "torch.linalg.svd and torch.svd_lowrank, unless A and B are stored"
    forms = ((("pairs",), ("R",)), ((), ("A", "B")))
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="block(p) > 0",
            when="has(pairs)",
            where="pairs",
            meaning="its length is not r * (r - 1) / 2 for any rank r",
        ),
        Rule(define="r", value="block(p)", when="has(pairs)", where="pairs"),
    )

    pairs: Tensor | None = tensor("p", optional=True)
    R: Tensor | None = tensor("r r", optional=True)
    a: Tensor | None = tensor("r", optional=True)
    b: Tensor | None = tensor("r", optional=True)
    A: Tensor | None = tensor("r in", optional=True)
    B: Tensor | None = tensor("out r", optional=True)
    symmetric: bool = False
    steps: int = attribute(0, least=0, most=1000, since=2)
    seed: int = attribute(0, since=2)
    terms: int = attribute(0, least=0, most=100)
    eps: float = 0.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A, B = _principal(W, min(rank, *W.shape), bool(attributes.get("symmetric", False)))
        r = len(A)
        return cls.from_fields(
            pairs=W.new_zeros(r * (r - 1) // 2), a=W.new_ones(r), b=W.new_ones(r), A=A, B=B, **attributes
        )

    def new_weight(self, W: Tensor) -> Tensor:
        R: Tensor = self._rotation() if self.R is None else self.R
        turned = R if self.b is None else R * self.b[:, None]
        turned = turned if self.a is None else turned * self.a
        A, B = self._factors_of(W, len(R)) if self.A is None or self.B is None else (self.A, self.B)
        changed: Tensor = W + B @ (turned - identity(R)) @ A
        return changed

    def _factors_of(self, W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Compute A and B from W: by exact SVD if `steps` is 0, else by randomised SVD with `steps - 1` iterations."""
        if not self.steps:
            return _principal(W, r, self.symmetric)
        return _split(*singular_by_sketch(W, r, self.steps - 1, self.seed), self.symmetric)

    def _rotation(self) -> Tensor:
        assert self.pairs is not None
        Q = skew(self.pairs)
        Q = shortened(Q, (Q * Q).sum(), self.eps, 0.0) if self.eps > 0 else Q
        return neumann(Q, self.terms) if self.terms else cayley(-Q)


def _principal(W: Tensor, r: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return A `[r, in]` and B `[out, r]`, computed by an exact SVD of W."""
    U, S, V = singular(W)
    return _split(U[:, :r], S[:r], V[:r], symmetric)


def _split(U: Tensor, S: Tensor, V: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    return (S[:, None] ** 0.5 * V, U * S**0.5) if symmetric else (1 * V, U * S)
