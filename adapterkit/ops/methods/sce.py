"""SCE: entries that vary most between changes are selected, weights calculated from their squares, minorities erased.

Wan et al. 2024 (FuseChat), https://arxiv.org/abs/2408.07990. The paper merges selected entries alone, as mergekit does;
in the authors' code (https://github.com/fanqiwan/FuseAI, sce_merging.py) what is selected decides on the weights, and
all entries are merged with them. The share of 0.1 is that of its fusechat-sce.yml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import SIGN, Entrywise, largest
from ._method import parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


UNSELECTED = "entries that were not selected are left out, or merged by the same weights"


class SCE(Entrywise):
    """sum_t w_t M_t D_t / sum_t w_t M_t over the selected entries, w_t the part of D_t in the mean squares there."""

    title = "SCE"
    paper = "https://arxiv.org/abs/2408.07990"
    compat: ClassVar = {"mergekit": {"select": 1.0}}

    select: float = parameter(
        0.1, "share of the entries that vary at all to select, those that vary most", least=0, most=1
    )
    unselected: str = parameter("drop", UNSELECTED, among=("drop", "keep"))
    sign: str = parameter("total", SIGN, among=("total", "frequency"))

    def merged(self, changes: Array, weights: Array, at: At) -> Array:
        import numpy as np

        selected = changes * self._selected(changes)
        squares = (selected * selected).reshape(len(changes), -1).mean(1) * weights
        D = selected if self.unselected == "drop" else changes
        parts = squares / squares.sum() if squares.sum() else np.full(len(D), 1 / len(D))
        w = parts.reshape(-1, *[1] * (D.ndim - 1)) + np.zeros(D.shape)
        votes = (D if self.sign == "total" else np.sign(D)).sum(0)
        agree = np.sign(D) == np.where(votes >= 0, 1.0, -1.0)
        below = (w * agree).sum(0)
        result: Array = self.scale * (w * agree * D).sum(0) / np.where(below == 0, 1.0, below)
        return result

    def _selected(self, changes: Array) -> Array:
        import numpy as np

        if self.select >= 1 or len(changes) == 1:
            return np.ones(changes.shape[1:], bool)
        spread = changes.var(0, ddof=1)
        return largest(spread, int(self.select * np.count_nonzero(spread)))
