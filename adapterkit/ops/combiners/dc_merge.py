"""DC-Merge: even out each task's singular values, and run TIES in one pair of bases that covers all tasks.

The first r directions of task t get singular values with the same sum, either all equal (average) or on a line. The
bases are the polar factors of [U_1 .. U_T] and [V_1 .. V_T]. In them each task keeps its largest entries, signs are
elected, and entries that agree are averaged. Entries between directions of two different tasks are dropped. Zhang et
al. 2026, https://arxiv.org/abs/2603.06242, https://github.com/Tobeginwith/DC-Merge. The kept share, 0.001, is the
authors' for vision models and for LLaVA, where r is 16, the rank of their LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Spectral, parameter
from ._entrywise import DENSITY
from ._scaled import Scaled
from ._spectra import leading, polar

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext

SMOOTHING = "the singular values of a task: all equal (average), or on a line (linear)"


TIED = 1e-9
"""Entries that are smaller than the smallest kept entry by less than this fraction are kept too."""


class DCMerge(Scaled, Spectral):
    """U (M o [same task]) V^T, where M is the elected mean of U^T U_t diag(e_t) V_t^T V."""

    title = "Directional consistency (DC-Merge)"
    paper = "https://arxiv.org/abs/2603.06242"

    directions: int | None = parameter(
        None, "directions that a task keeps; all of its rank if not given", least=1, kind=int
    )
    smoothing: str = parameter("average", SMOOTHING, among=("average", "linear"))
    rho: float = parameter(5.0, "largest ratio of the largest to the smallest singular value on a line", least=1)
    density: float = parameter(0.001, DENSITY, least=0, most=1)

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        parts = [leading(w * M, self.directions) for M, w in zip(cores, weights, strict=True)]
        U, V = polar(np.hstack([part[0] for part in parts])), polar(np.vstack([part[2] for part in parts]))
        found = np.stack([(U.T @ u * self._even(s)) @ (vh @ V.T) for u, s, vh in parts])
        for M in found if found.size else ():
            sizes = np.sort(np.abs(M), None)
            # Entries of directions that no other task shares differ only by rounding, which must not decide.
            M *= np.abs(M) >= (1 - TIED) * sizes[-max(int(self.density * M.size), 1)]
        total = found.sum(0)
        agree = np.sign(found) == np.sign(total)
        merged = (found * agree).sum(0) / np.maximum(agree.sum(0), 1)
        # A row and a column of M stand for directions of two tasks; only pairs of the same task are kept.
        owner = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])
        own = owner[: U.shape[1], None] == owner[: V.shape[0]]
        return np.asarray(self.scale * U @ (merged * own) @ V)

    def _even(self, S: Array) -> Array:
        """Return singular values with the same sum that differ less."""
        import numpy as np

        if not len(S):
            return S
        ratio = 1.0 if self.smoothing == "average" else min(self.rho, float(S[0] / S[-1]))
        line = np.linspace(ratio, 1.0, len(S))
        return np.asarray(S.sum() * line / line.sum())
