"""TSV-M: singular directions of all tasks beside one another, made orthonormal, with their own singular values.

U = polar([U_1 .. U_T]), V = polar([V_1 .. V_T]), D = scale * U diag(S_1 .. S_T) V^T.
Gargiulo et al. 2024, https://arxiv.org/abs/2412.00081
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._entrywise import SCALE
from ._method import Spectral, parameter
from ._spectra import joined, leading

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class TSV(Spectral):
    """Task singular vectors, whitened by polar factors; of thin factors each task keeps all that it has."""

    title = "Task singular vectors (TSV-M)"
    paper = "https://arxiv.org/abs/2412.00081"

    directions: int | None = parameter(
        None, "directions that a task keeps; all of its rank if not given", least=1, kind=int
    )
    scale: float = parameter(1.0, SCALE)

    def core(self, cores: Array, weights: Array, at: At) -> Array:
        parts = [leading(w * M, self.directions) for M, w in zip(cores, weights, strict=True)]
        U, S, Vh = joined(parts)
        return self.scale * (U * S) @ Vh
