"""LoRA-LEGO: cluster the pairs (row of A, column of B) of all tasks, and use each cluster's centre as one pair.

Each centre is scaled, so that its largest magnitude is the mean of its members' largest magnitudes. The result is
multiplied by sqrt(n / r), where n is the number of all tasks' pairs, and r is the rank of the result. Zhao et al. 2024,
https://arxiv.org/abs/2409.16167. The authors of CtM implement LoRA-LEGO as `merge_MSUs`, in
https://github.com/ZhengbaoHe/compress-then-merge. Both scales are from this function, and so are the ten starts of
k-means and the default rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import Pairwise, parameter
from ._entrywise import Scaled

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


class Lego(Scaled, Pairwise):
    """Pairs of a row of A and a column of B (minimal semantic units), clustered by k-means."""

    title = "LoRA-LEGO"
    paper = "https://arxiv.org/abs/2409.16167"
    depends: ClassVar = frozenset({"factors", "order", "size", "seed"})

    rank: int | None = parameter(None, "rank of the result; default: the largest rank of a task", least=1, kind=int)
    starts: int = parameter(10, "number of starts of k-means; the best result is used", least=1)

    def factors(self, Bs: list[Array], As: list[Array], at: FormulaContext) -> tuple[Array, Array]:
        import numpy as np

        A, B = np.vstack(As), np.hstack(Bs)
        rank = self.rank or max(len(each) for each in As)
        if rank > len(A):
            raise UsageError(
                f"rank {rank} exceeds the sum of the adapters' ranks, {len(A)}",
                where="rank",
                cure=f"Choose a rank of at most {len(A)}",
            )
        units = np.hstack([A, B.T])
        owner = clusters(units @ units.T, rank, at.uniform(0, (self.starts, rank)))
        centres = np.stack([_centre(units[owner == c]) for c in range(rank)])
        scale = self.scale * math.sqrt(len(units) / rank)
        return scale * centres[:, A.shape[1] :].T, centres[:, : A.shape[1]]


def _centre(members: Array) -> Array:
    import numpy as np

    mean = members.mean(0)
    size = np.abs(mean).max()
    centre: Array = mean * (np.abs(members).max(1).mean() / size) if size else mean
    return centre


def clusters(gram: Array, count: int, chances: Array) -> Array:
    """Run k-means on points whose inner products are known; return the index of each point's cluster, `[n]`.

    No cluster is empty.

    Args:
        gram: the inner products of the points, `[n, n]`.
        count: the number of clusters.
        chances: random numbers in [0, 1), `[starts, count]`. Each row determines the initial centres of one start.
    """
    import numpy as np

    best, least = np.zeros(len(gram), int), np.inf
    for start in chances:
        owner, cost = _descend(gram, _distances_to(gram, _seeds(gram, start)).argmin(1), count)
        if cost < least:
            best, least = owner, cost
    return best


def _seeds(gram: Array, chances: Array) -> Array:
    """Draw the initial centres from the points, as in k-means++; return the indices of the drawn points.

    The first centre is drawn uniformly. For each later centre, a point's probability is proportional to its squared
    distance to the nearest centre that is already drawn.
    """
    import numpy as np

    chosen = [int(chances[0] * len(gram))]
    while len(chosen) < len(chances):
        nearest = np.maximum(_distances_to(gram, np.array(chosen)).min(1), 0.0)
        nearest[chosen] = 0.0
        sums = nearest.cumsum()
        free = [i for i in range(len(gram)) if i not in chosen]
        drawn = int(np.searchsorted(sums, chances[len(chosen)] * sums[-1], side="right")) if sums[-1] else free[0]
        chosen.append(drawn if drawn < len(gram) and drawn not in chosen else free[0])
    return np.array(chosen)


def _distances_to(gram: Array, points: Array) -> Array:
    # Compute |x - y|^2 from inner products, because the points are long: each has in * k + out elements.
    sizes = gram.diagonal()
    distances: Array = sizes[:, None] - 2 * gram[:, points] + sizes[points]
    return distances


def _descend(gram: Array, owner: Array, count: int) -> tuple[Array, float]:
    """Run Lloyd's algorithm; return each point's cluster, and the sum of the squared distances to the centres.

    The algorithm stops when no point changes its cluster. It also stops after 300 steps, and before a step that would
    leave a cluster empty. If a cluster is empty at the start, the point that is farthest from its own cluster's centre
    moves to the empty cluster. A point that is alone in its cluster never moves in this way.
    """
    import numpy as np

    distances: Array = np.zeros((len(owner), count))
    for _ in range(300):
        shares = np.eye(count)[owner]
        for empty in np.flatnonzero(shares.sum(0) == 0):
            lone = shares.sum(0)[owner] == 1
            nearest_ = np.where(
                lone, -1.0, _to_centres(gram, shares / np.maximum(shares.sum(0), 1))[np.arange(len(owner)), owner]
            )
            owner = owner.copy()
            owner[nearest_.argmax()] = empty
            shares = np.eye(count)[owner]
        distances = _to_centres(gram, shares / shares.sum(0))
        moved = distances.argmin(1)
        if (moved == owner).all() or (np.eye(count)[moved].sum(0) == 0).any():
            break
        owner = moved
    return owner, float(distances[np.arange(len(owner)), owner].sum())


def _to_centres(gram: Array, means: Array) -> Array:
    distances: Array = gram.diagonal()[:, None] - 2 * gram @ means + ((gram @ means) * means).sum(0)
    return distances
