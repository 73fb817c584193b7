"""Forms other than a LoRA for the difference of a matrix: the nearest of each, with its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..io.computed import held
from ..io.lazy import DTYPES, from_numpy
from ..linalg.products import even_split
from ..methods.loha import LoHa
from ..methods.lokr import LoKr
from ..methods.shira import SHiRA
from .building import balanced
from .criteria import Criterion
from .sketching import dominant

if TYPE_CHECKING:
    from ..core.updates import Additive
    from ..io.computed import Array
    from ..io.lazy import DType

    Form = Callable[[Array, Criterion, int, DType], Additive]


SWEEPS = 12
"""Rounds of least squares over the four factors of a Hadamard product."""

RIDGE = 1e-9
"""What is added to the squares, as a part of them, so that directions of no weight do no harm."""


def loha(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """Two products of the rank, multiplied entry by entry, near to `D [out, in]`, and nearer than a LoRA of the rank.

    From that LoRA times ones, by alternating least squares: with three factors held, the rows of the fourth are found
    by small systems of equations, and no step makes the error larger. The nearest of all has no closed formula.

    Raises:
        UsageError: an energy or an error was asked for, which no choice of a rank can promise.
    """
    import numpy as np

    rank = _rank(criterion, "Hadamard product")
    D = D.astype(np.float64, copy=False)
    a, b = balanced(*dominant(D, Criterion(rank=rank), seed))
    c, d = np.zeros((len(D), rank)), np.random.default_rng(seed).standard_normal((rank, D.shape[1]))
    c[:, 0], d[0] = 1.0, 1.0
    for _ in range(SWEEPS):
        c = _least_squares(D, a @ b, d)
        d = _least_squares(D.T, (a @ b).T, c.T).T
        a = _least_squares(D, c @ d, b)
        b = _least_squares(D.T, (c @ d).T, a.T).T
    factors = {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}
    fields: dict[str, Any] = {name: held(values, dtype) for name, values in factors.items()}
    return LoHa(**fields)


def _least_squares(D: Array, H: Array, R: Array) -> Array:
    """L `[m, r]` with the least |D - (L @ R) * H|, row by row; R is `[r, n]`."""
    import numpy as np

    r = len(R)
    squares = ((H * H) @ (R[:, None] * R).reshape(r * r, -1).T).reshape(-1, r, r)
    sizes = np.trace(squares, axis1=1, axis2=2)
    squares[:, range(r), range(r)] += (RIDGE * sizes + (sizes == 0))[:, None]
    found: Array = np.linalg.solve(squares, ((D * H) @ R.T)[..., None])[..., 0]
    return found


def lokr(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """The Kronecker product nearest to `D [out, in]`, of sides as LyCORIS splits them; `rank` is that of w2.

    With D's blocks as rows of a matrix it is that matrix's first singular pair: Van Loan and Pitsianis 1993,
    https://doi.org/10.1007/978-94-015-8196-7_17. Cutting w2 to a rank comes after it.

    Raises:
        UsageError: an energy or an error was asked for, which no choice of a rank can promise.
    """
    rank = _rank(criterion, "Kronecker product")
    (a, m), (c, n) = (even_split(side) for side in D.shape)
    blocks = D.reshape(a, m, c, n).swapaxes(1, 2).reshape(a * c, m * n)
    left, right = balanced(*dominant(blocks, Criterion(rank=1), seed))
    w2: Array = right.reshape(m, n)
    factors: dict[str, Array] = {"w1": left.reshape(a, c), "w2": w2}
    if rank < min(m, n):
        factors["w2_a"], factors["w2_b"] = balanced(*dominant(w2, Criterion(rank=rank), seed))
        del factors["w2"]
    fields: dict[str, Any] = {name: held(values, dtype) for name, values in factors.items()}
    return LoKr(**fields)


def shira(D: Array, criterion: Criterion, _seed: int, dtype: DType) -> Additive:
    """The largest entries of `D [out, in]`: as many as a LoRA of the rank has, or as an energy or an error needs."""
    import numpy as np

    flat = D.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")
    if criterion.rank is None:
        sizes = np.abs(flat[order]).astype(np.float64)
        count = criterion.counts([sizes], [float(np.sqrt((sizes * sizes).sum()))])[0]
    else:
        count = criterion.rank * sum(D.shape)
    kept = np.sort(order[:count])
    index: Any = from_numpy(np.stack(np.divmod(kept, D.shape[1])))
    values: Any = held(flat[kept], DTYPES["F64"] if D.dtype == "float64" else dtype)
    return SHiRA(index=index, values=values)


def _rank(criterion: Criterion, form: str) -> int:
    if criterion.rank is None:
        raise UsageError(f"a {form} has a rank to choose, no energy or error", where="rank", cure="Give one")
    return criterion.rank


FORMS: Mapping[str, Form] = {"loha": loha, "lokr": lokr, "shira": shira}
