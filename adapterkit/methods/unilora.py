"""Uni-LoRA: LoRA whose factors repeat the elements of one shared vector.  Li et al. 2025, arXiv:2506.00799

Every element of A and B is an element of the vector theta, multiplied by a fixed scale. If the factors of all
modules use an element of theta n times in total, the scale of this element is `1 / sqrt(n)`. With these scales, the map
from theta to all factors is an isometry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.namespace import namespace
from ._low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..core.updates import Random

LENGTH = 256
"""The length of theta in a new update."""


class UniLoRA(LowRank):
    """W' = W + B @ A, A = theta[indices_A] * scales_A, B = theta[indices_B] * scales_B."""

    blocks = frozenset({"out", "in"})
    linear_only = True
    paper = "https://arxiv.org/abs/2506.00799"
    starts_at_base = False
    frozen: ClassVar[frozenset[str]] = frozenset({"indices_A", "scales_A", "indices_B", "scales_B"})

    theta: Tensor = tensor("d")
    indices_A: Tensor = tensor("r in", integer=True, below="d")
    scales_A: Tensor = tensor("r in")
    indices_B: Tensor = tensor("out r", integer=True, below="d")
    scales_B: Tensor = tensor("out r")

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        theta = 0.02 * random((LENGTH,))
        return {"theta": theta, "uses": theta.new_tensor(rank * sum(map(sum, shapes)) / LENGTH)}

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, uses: Tensor | None = None, **attributes: object
    ) -> Self:
        shared = cls.shared([tuple(W.shape)], rank, random)
        scale, (out, in_) = float(shared["uses"] if uses is None else uses) ** -0.5, W.shape
        used = random((rank * (in_ + out),)).argsort() % LENGTH
        tensors = {
            "indices_A": used[: rank * in_].reshape(rank, in_), "scales_A": W.new_full((rank, in_), scale),
            "indices_B": used[rank * in_ :].reshape(out, rank), "scales_B": W.new_full((out, rank), scale),
        }  # fmt: skip
        return cls.from_fields(**{"theta": shared["theta"], **tensors, **attributes})

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        xp = namespace(self.theta)
        # Convert indices to int64: torch treats uint8 indices as masks, and does not support other small integers.
        A, B = (xp.astype(indices, xp.int64) for indices in (self.indices_A, self.indices_B))
        return self.theta[B] * self.scales_B, self.theta[A] * self.scales_A
