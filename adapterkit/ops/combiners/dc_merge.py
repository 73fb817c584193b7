"""DC-Merge: make each task's singular values more equal, and run TIES in bases that all tasks share.

The first r singular values of task t are replaced by values with the same sum: all equal (average), or linearly
decreasing (linear). The bases are the polar factors of [U_1 .. U_T] and [V_1 .. V_T]. In these bases, each task keeps
its largest entries, signs are elected, and entries with the elected sign are averaged. Each row and each column of the
average stands for a singular vector of one task. Entries whose row and column belong to different tasks are dropped.
Zhang et al. 2026, https://arxiv.org/abs/2603.06242, https://github.com/Tobeginwith/DC-Merge. The default share of kept
entries, 0.001, is the authors' value for vision models and for LLaVA (r = 16, the rank of their LoRA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Spectral, leading, parameter, polar
from ._entrywise import DENSITY, Scaled

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext

SMOOTHING = "the new singular values of a task: all equal (average), or linearly decreasing (linear)"


TIED = 1e-9
"""Relative tolerance: entries that are below the threshold by less than this fraction are also kept."""


class DCMerge(Scaled, Spectral):
    """U (M o [same task]) V^T, where M is the elected mean of U^T U_t diag(e_t) V_t^T V.

    The vector e_t contains the new singular values of task t.
    """

    title = "Directional consistency (DC-Merge)"
    paper = "https://arxiv.org/abs/2603.06242"

    directions: int | None = parameter(
        None, "number of singular directions to keep per task; default: the task's rank", least=1, kind=int
    )
    smoothing: str = parameter("average", SMOOTHING, among=("average", "linear"))
    rho: float = parameter(
        5.0, "with smoothing=linear, the first singular value is at most rho times the last one", least=1
    )
    density: float = parameter(0.001, DENSITY, least=0, most=1)

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        parts = [leading(w * M, self.directions) for M, w in zip(cores, weights, strict=True)]
        U, V = polar(np.hstack([part[0] for part in parts])), polar(np.vstack([part[2] for part in parts]))
        scaled_cores = np.stack([(U.T @ u * self._even(s)) @ (vh @ V.T) for u, s, vh in parts])
        for M in scaled_cores if scaled_cores.size else ():
            sizes = np.sort(np.abs(M), None)
            # If no other task shares a task's directions, the entries for these directions can be equal except for
            # rounding. Allow a tolerance at the threshold, so that rounding does not decide which entries are kept.
            M *= np.abs(M) >= (1 - TIED) * sizes[-max(int(self.density * M.size), 1)]
        total = scaled_cores.sum(0)
        agree = np.sign(scaled_cores) == np.sign(total)
        merged = (scaled_cores * agree).sum(0) / np.maximum(agree.sum(0), 1)
        # Each row and each column of `merged` stands for a singular vector of one task. Keep entries whose row and
        # column belong to the same task.
        owner = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])
        same_owner = owner[: U.shape[1], None] == owner[: V.shape[0]]
        return np.asarray(self.scale * U @ (merged * same_owner) @ V)

    def _even(self, S: Array) -> Array:
        """Return the new singular values: equal or linearly decreasing, with the sum of S."""
        import numpy as np

        if not len(S):
            return S
        ratio = 1.0 if self.smoothing == "average" else min(self.rho, float(S[0] / S[-1]))
        line = np.linspace(ratio, 1.0, len(S))
        return np.asarray(S.sum() * line / line.sum())
