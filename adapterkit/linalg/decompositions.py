"""Matrix decompositions of weights, for methods whose formula needs them; computed once per weight of a live model.

No gradient flows through them, because such a method uses the base's decomposition at the start of its training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from .namespace import namespace


def svd(W: Any) -> tuple[Any, Any, Any]:
    """Return (U, S, V) with W = (U * S) @ V, thin, S descending; in W's dtype, computed in float32 or wider."""
    parts: tuple[Any, Any, Any] = _kept(W, "svd", lambda xp, wide: xp.linalg.svd(wide, full_matrices=False))
    return parts


def qr(W: Any) -> tuple[Any, Any]:
    """Return the thin (Q, R) with W = Q @ R, Q's columns orthonormal; in W's dtype, computed in float32 or wider."""
    parts: tuple[Any, Any] = _kept(W, "qr", lambda xp, wide: xp.linalg.qr(wide))
    return parts


def _kept(W: Any, name: str, decompose: Callable[[Any, Any], Any]) -> Any:
    """Return the parts; for a torch tensor they are cached until it is freed, written to, moved or cast."""
    # Skip the cache while torch.compile traces, because a lookup would break the graph.
    if not hasattr(W, "_version") or _compiling():
        return _parts(W, decompose)
    # Detect a changed tensor: `_version` counts in-place writes; `.to()` and `.data` change the other values.
    state = W._version, W.data_ptr(), W.dtype, W.device
    held = _memory().setdefault(W, {})
    if name not in held or held[name][0] != state:
        held[name] = state, _parts(W.detach(), decompose)
    return held[name][1]


def _parts(W: Any, decompose: Callable[[Any, Any], Any]) -> Any:
    xp = namespace(W)
    # Compute in float32 or wider: linear algebra libraries have no 16-bit routines.
    wide = W if W.dtype in (xp.float32, xp.float64) else xp.astype(W, xp.float32)
    return tuple(xp.astype(part, W.dtype) for part in decompose(xp, wide))


def _compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


@cache
def _memory() -> Any:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()
