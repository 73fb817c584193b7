"""HRA: a product of reflections on the inputs.  Yuan et al. 2024, https://arxiv.org/abs/2405.17484

W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), where each u_i is a column of `u`, scaled to length 1. With
`gram_schmidt`, the columns are first made orthogonal. The product is then a single reflection, which depends only on
the space that the columns span.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor
from ..errors import Unsupported
from ..linalg.namespace import namespace
from ..linalg.rotations import in_float32

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class HRA(WeightUpdate):
    """W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T) or, with `gram_schmidt`, W' = W - 2 W @ U @ U^T.

    u_i is column i of `u`, scaled to length 1. U is the factor Q of the QR decomposition of `u`.
    """

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2405.17484"

    u: Tensor = tensor("columns r")
    gram_schmidt: bool = False

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        if rank % 2 or attributes.get("gram_schmidt"):
            why = "with an odd rank or with gram_schmidt, HRA cannot start without changing the weight"
            raise Unsupported(why, where="rank", cure="Pass an even rank, without gram_schmidt")
        half = random((math.prod(W.shape[1:]), rank // 2))
        return cls.from_fields(u=half[:, [i // 2 for i in range(rank)]], **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        X = W.reshape(len(W), -1)
        if self.gram_schmidt:
            U = in_float32(lambda u: namespace(u).linalg.qr(u)[0], self.u)
            X = X - 2 * (X @ U) @ U.mT
        for i in range(0 if self.gram_schmidt else self.u.shape[1]):
            u = self.u[:, i : i + 1]
            X = X - (2 / (u * u).sum()) * (X @ u) @ u.mT
        return X.reshape(W.shape)
