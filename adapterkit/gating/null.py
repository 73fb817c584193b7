"""Create the null adapter: random changes of the same size at the same targets, as a reference for the effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..methods.dense import Dense
from ..methods.lora import LoRA
from ..ops.alignment import places, side_by_side
from ..ops.comparison import lowered

if TYPE_CHECKING:
    import torch
    from numpy.random import Generator

    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..ops.lowering import Change, Delta

RANK = 8
"""The rank of the random change if the adapter's change has full rank."""


def null_adapter(
    adapters: Sequence[Adapter], base: Checkpoint, *, weights: Sequence[float], seed: int, rename: str | Sequence[str]
) -> Adapter:
    """Return an adapter whose random change at each target has the Frobenius norm of the adapters' summed change.

    Args:
        adapters: the adapters.
        base: the base of the adapters, with weights that are not quantized.
        weights: a factor for each adapter.
        seed: the seed of the random numbers.
        rename: rules for names, as in `adapterkit.merge`.

    Raises:
        NotMergeable: an adapter changes outputs or context, not only weights, so its change has no norm.
        AdapterkitError: an adapter does not fit the base.
    """
    import numpy as np

    _, found = places(adapters, base=base, disjoint=True, rename=rename)
    rng = np.random.default_rng(seed)
    updates: dict[Target, Any] = {}
    for place in found:
        changes = lowered(place).changes(weights)
        made = [*_weights(changes, place.target.stacked, rng), *_biases(changes, place.target.stacked, rng)]
        if made:
            updates[place.target] = tuple(made)
    return Adapter(updates)


def _weights(changes: Sequence[Change | None], stacked: bool, rng: Generator) -> list[Update]:
    import numpy as np

    shape = next(change.shape for change in changes if change is not None)
    pairs = [_random(_sum(row), rng) for row in side_by_side(changes)]
    if not pairs:
        return []
    if len(shape) == 1:
        return [Dense(D=_torch((pairs[0][0] @ pairs[0][1]).reshape(shape)), d=None)]
    rank = max(B.shape[1] for B, _ in pairs)
    Bs = [np.pad(B, ((0, 0), (0, rank - B.shape[1]))) for B, _ in pairs]
    As = [np.pad(A, ((0, rank - len(A)), (0, 0))) for _, A in pairs]
    B = np.stack(Bs) if stacked else Bs[0]
    A = np.stack([each.reshape(rank, *shape[1:]) for each in As]) if stacked else As[0].reshape(rank, *shape[1:])
    return [LoRA(A=_torch(A), B=_torch(B), bias=None)]


def _biases(changes: Sequence[Change | None], stacked: bool, rng: Generator) -> list[Update]:
    import numpy as np

    moved = [change.bias() for change in changes if change is not None]
    present = [each for each in moved if each is not None]
    if not present:
        return []
    whole: Any = sum(present)
    drawn = rng.standard_normal(whole.shape)
    # For stacked experts, compute the norm of each expert's bias separately.
    axis = -1 if stacked else None
    size = np.linalg.norm(whole, axis=axis, keepdims=stacked) / np.linalg.norm(drawn, axis=axis, keepdims=stacked)
    return [Dense(D=None, d=_torch(drawn * size))]


def _sum(row: Sequence[Delta | None]) -> list[Delta]:
    return [delta for delta in row if delta is not None]


def _random(deltas: Sequence[Delta], rng: Generator) -> tuple[Array, Array]:
    """Return random factors whose product has the same norm as the sum of the changes."""
    import numpy as np

    out, columns = deltas[0].shape
    thin = all(delta.rest is None for delta in deltas)
    rank = max(1, min(sum(delta.rank for delta in deltas) if thin else RANK, out, columns))
    if thin:
        size = _norm(np.hstack([delta.B for delta in deltas]), np.vstack([delta.A for delta in deltas]))
    else:
        whole: Any = sum(delta.dense() for delta in deltas)
        size = float(np.linalg.norm(whole))
    B, A = rng.standard_normal((out, rank)), rng.standard_normal((rank, columns))
    return B * (size / _norm(B, A)), A


def _norm(B: Array, A: Array) -> float:
    """Return the Frobenius norm of B @ A, without forming the product."""
    return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


def _torch(array: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(array.astype("float32"))
