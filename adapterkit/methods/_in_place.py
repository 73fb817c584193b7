"""Base class of methods that replace a part of W by a low-rank product; cached SVD and QR decompositions of W."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import cache
from typing import TYPE_CHECKING, cast

from ..core.updates import WeightUpdate, tensor
from ..linalg.namespace import N, Namespace, namespace

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class InPlace(WeightUpdate):
    """W' = W - taken(W) + scaling * B @ A. Subclasses define `taken`, the part of W that is removed."""

    linear_only = True

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    def taken(self, W: Tensor) -> Tensor:
        """Return the part of W to remove; its rank is at most r."""
        raise AssertionError("each method defines it")

    def left(self) -> Tensor:
        """Return the factor that precedes A in the product: B, or B times a diagonal matrix."""
        return self.B

    def new_weight(self, W: Tensor) -> Tensor:
        new: Tensor = W - self.taken(W) + (self.scaling * self.left()) @ self.A
        return new


# SVD and QR decompositions for methods whose formula needs them. Each weight of a live model is decomposed only once.
#
# No gradient flows through a decomposition, because these methods decompose the base's weight as it was before
# training, and treat the factors as constants.


Decompose = Callable[[Namespace[N], N], tuple[N, ...]]
"""A function of (array namespace, matrix) that returns the factors of a decomposition."""


def svd(W: N) -> tuple[N, N, N]:
    """Return the thin SVD (U, S, V) with `W = (U * S) @ V`, in W's dtype, computed in float32 or wider; S descends."""
    U, S, V = _kept(W, "svd", lambda xp, wide: xp.linalg.svd(wide, full_matrices=False))
    return U, S, V


def qr(W: N) -> tuple[N, N]:
    """Return the thin QR decomposition (Q, R) with `W = Q @ R`, in W's dtype, computed in float32 or wider."""
    Q, R = _kept(W, "qr", lambda xp, wide: xp.linalg.qr(wide))
    return Q, R


def _kept(W: N, name: str, decompose: Decompose[N]) -> tuple[N, ...]:
    """Decompose W. If W is a torch tensor, its factors are cached until W is freed, written to, moved or cast."""
    # Skip the cache while torch.compile traces, because a lookup would cause a graph break.
    if not hasattr(W, "_version") or _compiling():
        return _parts(W, decompose)
    # Decompose again if the tensor has changed. In-place writes increase `_version`. `.to()` and assignments to `.data`
    # change the pointer, the dtype or the device.
    weight = cast("torch.Tensor", W)
    decomposed = cast("Decompose[torch.Tensor]", decompose)
    state = weight._version, weight.data_ptr(), weight.dtype, weight.device
    entries = _memory().setdefault(weight, {})
    if name not in entries or entries[name][0] != state:
        entries[name] = state, _parts(weight.detach(), decomposed)
    return cast("tuple[N, ...]", entries[name][1])


def _parts(W: N, decompose: Decompose[N]) -> tuple[N, ...]:
    xp = namespace(W)
    # Compute in float32 or wider: linear algebra libraries have no 16-bit routines.
    wide = W if W.dtype in (xp.float32, xp.float64) else xp.astype(W, xp.float32)
    return tuple(xp.astype(part, W.dtype) for part in decompose(xp, wide))


def _compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


@cache
def _memory() -> MutableMapping[torch.Tensor, dict[str, tuple[object, tuple[torch.Tensor, ...]]]]:
    from torch.utils.weak import WeakTensorKeyDictionary

    memory: MutableMapping[torch.Tensor, dict[str, tuple[object, tuple[torch.Tensor, ...]]]] = WeakTensorKeyDictionary()
    return memory
