"""What a fold's updates hold, loaded and checked; and factors so thin that those of several are put side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.updates import Additive, Update
from ..errors import AdapterkitError, Unsupported
from ..io.lazy import Lazy, as_lazy
from .blocks import logical

if TYPE_CHECKING:
    from ..io.lazy import Leaf
    from .arrays import Arrays, Workspace
    from .fold import Fold

Term = tuple["Fold", list[Update], float]

LARGEST = 2.0**500
"""The largest number that is computed with."""

THIN = 256
"""Ranks up to which factors are put side by side with those of other adapters."""


def load_all(fold: Fold, arrays: Arrays) -> list[Update]:
    """The fold's updates in memory, in float64.

    Raises:
        Malformed: a factor holds a NaN or an infinity.
    """
    updates = [_load(update, fold, arrays) for update in fold.updates]
    if fold.seen is None:
        return updates
    W = _whole_view(arrays.load(fold.seen), fold)
    return [update.settled(W) for update in updates]


def _whole_view(W: Any, fold: Fold) -> Any:
    """A stored weight as the updates see it; of stacked experts, all of them."""
    axis = int(fold.target.stacked)
    W = W if fold.axis == "out" else W.swapaxes(axis, axis + 1)
    return W if fold.target.rows is None else W[(slice(None),) * axis + (slice(*fold.target.rows),)]


def _load(update: Update, fold: Fold, arrays: Arrays) -> Update:
    read = update.map(_read)
    try:
        read.check_values()
        _check_size(read)
    except AdapterkitError as error:
        # `read` is in memory and does not know its file any more.
        error.at(path=update.file)
        error.where = f"{fold.target}: {update.method}" + (f".{error.where}" if error.where else "")
        raise
    return read.map(arrays.load)


def _check_size(update: Update) -> None:
    """Refuse numbers whose squares overflow float64: DoRA would divide by an infinite norm, and write zeros."""
    for name, leaf in update.tensors.items():
        tensor = as_lazy(leaf)
        # The other types have no number above 2^128.
        if tensor.dtype.name == "F64" and abs(tensor.numpy()).max(initial=0) > LARGEST:
            why = f"a number above {LARGEST:.0e}, whose square float64 cannot hold"
            raise Unsupported(why, where=name, cure="The training diverged; use an earlier checkpoint")


def _read(leaf: Leaf) -> Leaf:
    """A leaf whose bytes are in memory: they are checked and then loaded, and read from disk once."""
    if not isinstance(leaf, Lazy):
        return leaf
    data = leaf.fetch()
    return Lazy(leaf.shape, leaf.dtype, lambda: data)


def norm_of(updates: list[Update], fold: Fold) -> float:
    """The Frobenius norm of what additive updates add."""
    shape = logical(fold)
    experts = range(fold.shape[0]) if fold.target.stacked else (None,)
    norms = []
    for expert in experts:
        parts = [u if expert is None else u.expert(expert) for u in updates]
        if len(parts) == 1 and isinstance(parts[0], Additive):
            norms.append(parts[0].delta_norm(shape))
        else:
            total: Any = sum(part.delta(shape) for part in parts if isinstance(part, Additive))
            norms.append(math.sqrt(float((total * total).sum())))
    # The square of a norm above 1e154 is no float any more; hypot scales first.
    return math.hypot(*norms)


def is_thin(fold: Fold, updates: Sequence[Update]) -> bool:
    """Whether all is a product of factors of so few ranks that the product is how it is best computed."""
    if len(fold.shape) != 2 or fold.target.stacked:
        return False
    pairs = [update.pair(logical(fold)) for update in updates if isinstance(update, Additive)]
    return len(pairs) == len(updates) and all(pair is not None and pair[1].shape[0] <= THIN for pair in pairs)


def side_by_side(terms: Sequence[Term], workspace: Workspace) -> Update:
    """sum of weight * B @ A over all updates as one LoRA of all their ranks; their folds' axes must be the same.

    Its factors lie in the workspace, until the next ones do.
    """
    from ..methods.lora import LoRA

    pairs = [(w, u.pair(logical(fold))) for fold, us, w in terms for u in additive(us)]
    factors = [(w, *pair) for w, pair in pairs if pair is not None]
    rank, rows, width = sum(len(A) for _, _, A in factors), len(factors[0][1]), factors[0][2].shape[1]
    A = workspace.take(rank * width, "A").reshape(rank, width)
    B = workspace.take(rows * rank, "B").reshape(rows, rank)
    at = 0
    for weight, b, a in factors:
        here = slice(at, at := at + len(a))
        A[here], B[:, here] = a, weight * b
    return LoRA(A=A, B=B, bias=None, scaling=1.0)


def additive(updates: Iterable[Update]) -> list[Additive]:
    """Those of them that are additive."""
    return [update for update in updates if isinstance(update, Additive)]
