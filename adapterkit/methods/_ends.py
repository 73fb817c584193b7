"""First and last positions of sequences, as ReFT counts them.  No method itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..linalg.namespace import namespace

Law = Callable[[Any], Any]


def changed_at_ends(y: Any, layer: Any, counts: tuple[int, int], first: Law, last: Law) -> Any:
    """Apply `first` at the first positions of y `[..., positions, channels]` and `last` at the last ones.

    If the model's call has a mask `[rows, positions]`, each row's positions are those that it does not hide.
    """
    mask: Any = (getattr(layer, "call", None) or {}).get("attention_mask")
    if getattr(mask, "ndim", 0) == 2 and tuple(mask.shape) == tuple(y.shape[:-1]):
        return _masked(y, mask, counts, first, last)
    begin, end = counts
    # Slices relative to the end, because a graph's sequences have no length before they run.
    before = y[..., :-end, :] if end else y
    behind = y[..., -end:, :] if end else y[..., :0, :]
    parts = [first(before[..., :begin, :]), before[..., begin:, :], last(behind)]
    return namespace(y).concat(parts, axis=-2)


def _masked(y: Any, mask: Any, counts: tuple[int, int], first: Law, last: Law) -> Any:
    xp, real = namespace(y), (mask != 0) * 1
    place = (real * 0 + 1).cumsum(-1) - 1 - real.argmax(-1)[:, None]
    left = real.sum(-1)[:, None] - place
    begun = xp.where(((place >= 0) & (place < counts[0]))[..., None], first(y), y)
    return xp.where(((left > 0) & (left <= counts[1]))[..., None], last(y), begun)
