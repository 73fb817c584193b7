"""Approximate a matrix's difference by LoHa, LoKr or SHiRA."""

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
"""The number of rounds of alternating least squares over the four factors of a LoHa."""

RIDGE = 1e-9
"""The relative regularization of least squares, which makes singular systems solvable."""


def loha(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """Approximate `D [out, in]` by a Hadamard product of two low-rank products.

    There is no closed formula for the best approximation. Alternating least squares starts from the best LoRA times a
    matrix of ones. With three factors fixed, each row of the fourth factor is the solution of a small linear system. No
    step increases the error, so the result is closer to D than the LoRA.

    Raises:
        UsageError: the criterion is an energy or an error; only a rank is accepted.
    """
    import numpy as np

    rank = _rank(criterion, "Hadamard product")
    D = D.astype(np.float64, copy=False)
    a, b = balanced(*dominant(D, Criterion(rank=rank), seed))
    c, d = np.zeros((len(D), rank)), np.random.default_rng(seed).standard_normal((rank, D.shape[1]))
    # The second product c @ d is initially all ones, from the first column of c and the first row of d. The other rows
    # of d are random, and the other columns of c are zero; the first least-squares step replaces these zeros.
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
    """Return the L `[m, r]` that minimises |D - (L @ R) * H|, with R `[r, n]`."""
    import numpy as np

    r = len(R)
    squares = ((H * H) @ (R[:, None] * R).reshape(r * r, -1).T).reshape(-1, r, r)
    sizes = np.trace(squares, axis1=1, axis2=2)
    squares[:, range(r), range(r)] += (RIDGE * sizes + (sizes == 0))[:, None]
    found: Array = np.linalg.solve(squares, ((D * H) @ R.T)[..., None])[..., 0]
    return found


def lokr(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """Approximate `D [out, in]` by the nearest Kronecker product w1 x w2, whose shapes LyCORIS's rule determines.

    Divide D into blocks of the shape of w2, and make each block a row of a matrix. w1 and w2 are the first singular
    vectors of this matrix: Van Loan and Pitsianis 1993, https://doi.org/10.1007/978-94-015-8196-7_17. Afterwards w2 is
    cut to the rank.

    Raises:
        UsageError: the criterion is an energy or an error; only a rank is accepted.
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
    """Keep the largest entries of `D [out, in]`.

    For a rank, keep as many entries as a LoRA of this rank has numbers; otherwise as many as the criterion requires.
    """
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
        why = f"a {form} needs a rank; energy and error do not determine it"
        raise UsageError(why, where="rank", cure="Give --rank N (rank=)")
    return criterion.rank


FORMS: Mapping[str, Form] = {"loha": loha, "lokr": lokr, "shira": shira}
