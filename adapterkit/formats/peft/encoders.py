"""Virtual tokens that a network computes: PEFT files hold what it computed, and not the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core.updates import ContextUpdate
from ...io.lazy import Lazy, as_array, as_lazy
from .families import family_of
from .file import make

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...core.updates import Update

PLAIN = {"embeddings": "prompt", "past": "prefix"}
"""Place of a context -> the method that holds it as it is."""


def has_encoder(update: Update) -> bool:
    """Whether an update is context that PEFT's files hold only as what its network computes."""
    return isinstance(update, ContextUpdate) and update.place in PLAIN and family_of(update) is None


def without_encoders(
    updates: Mapping[Target, tuple[Update, ...]],
) -> tuple[dict[Target, tuple[Update, ...]], list[str]]:
    """The same function of a base without networks, and a line for each that was left behind."""
    lines = [
        f"{t}: wrote what {u.method} computes, not its network"
        for t, us in updates.items()
        for u in us
        if has_encoder(u)
    ]
    changed = {t: tuple(_computed(u) if has_encoder(u) else u for u in us) for t, us in updates.items()}
    return changed, lines


def _computed(update: Any) -> Update:
    import numpy as np

    dtype = as_lazy(next(iter(update.tensors.values()))).dtype
    wide = update.map(lambda leaf: as_array(leaf).astype(np.float64))
    values = np.ascontiguousarray(getattr(wide, update.place)()).astype(dtype.array)
    P = Lazy(values.shape, dtype, lambda: values.tobytes())
    return make(PLAIN[update.place], {"P": P})
