"""LoKr: W' = W + scaling * kron(w1, w2).  Yeh et al. 2023, https://arxiv.org/abs/2309.14859

Each factor may be a low-rank product. In a convolution, w2 also has the kernel's axes, and may have a Tucker core. As
in LyCORIS, output p * m + i belongs to row p of w1 and row i of w2, where m is the number of rows of w2. Inputs are
ordered in the same way: by the column of w1, then by the column of w2. With `stacked`, w2 `[s, n, k]` is a stack of s
matrices. The Kronecker products of w1 `[a, c]` with these matrices are stacked to `[s, a * n, c * k]`, and reshaped to
the weight's shape. PEFT trains this form on `nn.Conv1d`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self, cast

from ..core.updates import Additive, Rule, attribute, tensor
from ..linalg.products import contracted, even_split, kron, sides, tucker
from .dense import Dense

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class LoKr(Additive):
    """W' = W + scaling * kron(w1, w2).

    w1 is stored as one matrix, or as w1_a @ w1_b. w2 is stored as one tensor, as w2_a @ w2_b, or as w2_a and w2_in with
    the Tucker core t2.
    """

    blocks = frozenset({"out"})
    forms = ((("w1",), ("w1_a", "w1_b")), (("w2",), ("w2_a", "w2_b"), ("w2_a", "t2", "w2_in")))
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(when="has(w2_b)", require="in % c == 0", meaning="the number of inputs is not a multiple of c"),
    )
    paper = "https://arxiv.org/abs/2309.14859"
    dropout: ClassVar[str] = "rows"
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="has(w2) and axes(w2) >= 3",
            when="stacked",
            where="stacked",
            error="Malformed",
            meaning="w2 is not a stack of matrices",
        ),
    )

    w1: Tensor | None = tensor("a c", optional=True)
    w1_a: Tensor | None = tensor("a r", optional=True)
    w1_b: Tensor | None = tensor("r c", optional=True)
    w2: Tensor | None = tensor("out/a in/c *k", optional=True)
    w2_a: Tensor | None = tensor("out/a r", optional=True)
    w2_b: Tensor | None = tensor("r columns/c", optional=True)
    t2: Tensor | None = tensor("r r *k", optional=True)
    w2_in: Tensor | None = tensor("r in/c", optional=True)
    scaling: float = 1.0
    stacked: bool = attribute(False, since=2)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        (a, rows), (c, inner) = even_split(W.shape[0]), even_split(W.shape[1])
        columns = inner * math.prod(W.shape[2:])
        w1 = W.new_zeros(a, c)
        if rank >= max(rows, inner) / 2:
            return cls.from_fields(w1=w1, w2=random((rows, inner, *W.shape[2:])) / columns**0.5, **attributes)
        w2_a, w2_b = random((rows, rank)) / rank**0.5, random((rank, columns)) / columns**0.5
        return cls.from_fields(w1=w1, w2_a=w2_a, w2_b=w2_b, **attributes)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        D: Tensor = self._product.reshape(shape)
        return D

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return B and A, or None if `stacked` is true.

        B is the Kronecker product of the left factors of w1 and w2, times `scaling`. A is the Kronecker product of the
        right factors of w1 and w2.
        """
        if self.stacked:
            return None
        left_1, right_1 = sides(self.w1_a, self.w1_b, self.w1)
        right = self.w2_b if self.t2 is None else contracted(self.t2, cast("Tensor", self.w2_in))
        left_2, right_2 = sides(self.w2_a, right, None if self.w2 is None else self._second)
        return kron(self.scaling * left_1, left_2), kron(right_1, right_2)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        squares = [float((factor * factor).sum()) for factor in (self._first, self._second)]
        return abs(self.scaling) * math.sqrt(math.prod(squares))

    def block(self, axis: str, start: int, stop: int) -> Self:
        w1, w2 = self._first, self._second
        if self.stacked:
            return cast(Self, Dense(D=self._product.reshape(len(w1) * len(w2), -1)[start:stop], d=None))
        first, last = start // len(w2), -(-stop // len(w2))
        rows = kron(self.scaling * w1[first:last], w2)[start - first * len(w2) : stop - first * len(w2)]
        # Return a dense update, because a range of rows of a Kronecker product need not be a Kronecker product.
        return cast(Self, Dense(D=rows, d=None))

    @property
    def _product(self) -> Tensor:
        """The Kronecker product of w1 and w2, times `scaling`. Reshaped to the weight's shape, it is the change."""
        w1: Tensor = self.scaling * self._first
        if not self.stacked:
            return kron(w1, self._second)
        w2 = cast("Tensor", self.w2)
        inner = w2.reshape(len(w2), 1, w2.shape[1], 1, -1)
        return w1.reshape(1, len(w1), 1, -1, 1) * inner

    @property
    def _first(self) -> Tensor:
        """The factor w1, `[a, c]`."""
        if self.w1_a is None or self.w1_b is None:
            return cast("Tensor", self.w1)
        return self.w1_a @ self.w1_b

    @property
    def _second(self) -> Tensor:
        """The factor w2, `[out / a, in / c * k]`."""
        if self.w2 is not None:
            return self.w2.reshape(len(self.w2), -1)
        w2_a = cast("Tensor", self.w2_a)
        if self.w2_b is not None:
            return w2_a @ self.w2_b
        return tucker(cast("Tensor", self.t2), w2_a, cast("Tensor", self.w2_in))
