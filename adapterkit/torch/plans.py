"""What a station works out once for one adapter at a linear layer, so that a forward of few tokens costs little more.

At one token the products of a LoRA take some microseconds. Asking which adapters act, of which kind their formulas are
and whether the layer is a plain one takes several times as long, and gives the same answer at every forward. A plan
holds that answer. It is thrown away when a switch or weight changes (`scopes.SETTINGS`), in another scope, and when the
layer or the adapter has other tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.updates import Update
from .layers import Layer
from .lean import is_wide, low_rank_linear, short_linear
from .scopes import Scope

if TYPE_CHECKING:
    from .station import Part

_PLAIN = (Tensor, nn.Parameter)


class Plan:
    """The forward of an `nn.Linear` with one low-rank update.

    Args:
        token: `SETTINGS.token` from before anything was looked at.
        scope: the scope that it is for.
        part: the only part that acts there; None where there is not one alone, of one low-rank update.
        layer: the layer.
    """

    def __init__(self, token: object, scope: Scope, part: Part | None, layer: Layer | None) -> None:
        self.token: object = token
        self.scope, self.part, self.usable = scope, part, False
        if part is None or layer is None:
            return
        self.updates: tuple[Update, ...] = part.updates
        update: Any = self.updates[0]
        W: Any = layer.module._parameters.get("weight")
        self.update, self.W, self.module, self.shape = update, W, layer.module, layer.shape
        with torch.no_grad():
            B, A, scaling = update.factors(self.shape)
        self.usable = (
            type(W) in _PLAIN
            and not W.is_meta
            and (B.shape[0], A.shape[1]) == self.shape
            and A.dtype == B.dtype
            and update.bias_delta() is None
        )
        if self.usable:
            self.kind = W.device.type
            leaves = update.tensors.values()
            # A LoRA's factors are its leaves. Other methods compute theirs anew in each forward.
            self.fixed = all(any(factor is leaf for leaf in leaves) for factor in (A, B))
            self.found = B, A, scaling * part.switch.weight

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        B, A, scaling = self.update.factors(self.shape)
        assert self.part is not None
        return B, A, scaling * self.part.switch.weight

    def run(self, x: Any) -> Tensor | None:
        """The layer's output; None where the station must look at everything itself."""
        if not self.usable or type(x) is not Tensor or self.part is None:
            return None
        W: Any = self.W
        held: Any = self.module._parameters
        if self.part.bound.updates is not self.updates or held.get("weight") is not W:
            self.token = None  # Of tensors from before; the next forward makes another.
            return None
        B, A, weight = self.found if self.fixed else self._factors()
        dtype, wide = W.dtype, A.dtype
        same = wide is dtype or (wide is torch.float32 and dtype.itemsize == 2)
        if not same or W.shape != self.shape or torch.is_autocast_enabled(self.kind):
            return None
        y = short_linear(x, W, held.get("bias"), A, B, weight)
        if y is None:
            A, B = (A, B) if wide is dtype or is_wide(W) else (A.to(dtype), B.to(dtype))
            y = low_rank_linear(x, W, held.get("bias"), A, B, weight)
        return y
