"""TSV-M: concatenate the singular vectors of all tasks, make them orthonormal, and keep the singular values.

U = polar([U_1 .. U_T]), V = polar([V_1 .. V_T]), D = scale * U diag(S_1 .. S_T) V^T. Gargiulo et al. 2024,
https://arxiv.org/abs/2412.00081. For a weight of m x n, each of T tasks keeps its first `int(min(m, n) / T)` singular
vectors, as in https://github.com/AntoAndGar/task_singular_vectors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._combiner import Spectral, joined, leading, parameter
from ._entrywise import Scaled

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


KEPT = "number of singular vectors to keep per task; default: min(out, in * k) / number of tasks, rounded down"


class TSV(Scaled, Spectral):
    """scale * U diag(S_1 .. S_T) V^T, where U and V contain the singular vectors of all tasks, made orthonormal.

    Low-rank adapters usually keep all singular vectors, because ranks above `min(out, in * k) / T` are rare.
    """

    title = "Task singular vectors (TSV-M)"
    paper = "https://arxiv.org/abs/2412.00081"

    directions: int | None = parameter(None, KEPT, least=1, kind=int)

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        directions = self.directions or max(min(at.shape[0], math.prod(at.shape[1:])) // len(cores), 1)
        parts = [leading(w * M, directions) for M, w in zip(cores, weights, strict=True)]
        U, S, Vh = joined(parts)
        return self.scale * (U * S) @ Vh
