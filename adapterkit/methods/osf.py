"""OSF: the part of W of its smallest singular values, trained.  Nayak et al. 2025, https://arxiv.org/abs/2504.07097

W' = W - T + U diag(S) V, where T is W's own part of the singular values that U, S and V stand for. Their training keeps
off the directions of the part that stays; the law does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..errors import ShapeMismatch
from ..tensors.namespace import namespace
from ..tensors.rotations import in_float32
from ..updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class OSF(WeightUpdate):
    """W' = W - T + U @ diag(S) @ V."""

    paper = "https://arxiv.org/abs/2504.07097"

    U: Tensor = tensor("out r")
    S: Tensor = tensor("r")
    V: Tensor = tensor("r in")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        U, S, V = _tail(W, min(rank, *W.shape))
        return cls(U=U, S=S, V=V, **attributes)

    def check_against(self, shape: tuple[int, ...]) -> None:
        rank = self.S.shape[-1]
        if len(shape) != 2 or rank > min(shape):
            why = f"{rank} singular values of a weight of {list(shape)}"
            raise ShapeMismatch(why, cure="OSF changes linear layers only, by at most their rank")

    def new_weight(self, W: Tensor) -> Tensor:
        U, S, V = _tail(W, len(self.S))
        changed: Tensor = W - (U * S) @ V + (self.U * self.S) @ self.V
        return changed


def _tail(W: Any, r: int) -> Any:
    """U `[out, r]`, S `[r]` and V `[r, in]` of the r smallest singular values."""
    U, S, V = in_float32(lambda W: tuple(namespace(W).linalg.svd(W, full_matrices=False)), W)
    return U[:, len(S) - r :], S[len(S) - r :], V[len(S) - r :]
