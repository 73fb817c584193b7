"""Activated LoRA: y' = y + scaling * B @ A x at the positions from a row's last invocation to the row's end.

Greenewald et al. 2025, https://arxiv.org/abs/2504.12397. The invocation is a fixed sequence of token ids. Positions
before its last occurrence, and rows without the invocation, keep the base's output. So keys and values that the base
computed and cached are valid for these positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, tensor
from ..errors import UsageError
from ..linalg.namespace import namespace
from ._routed import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class ALoRA(Routed):
    """y' = y + scaling * (B @ A x + bias), from each row's last invocation on; x is `[rows, tokens, in]`."""

    paper = "https://arxiv.org/abs/2504.12397"
    acts_on = "only the output from the last invocation on"
    asks = ("input_ids",)
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(require="length >= 1", where="invocation", error="Malformed", meaning="the invocation is empty"),
    )

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    invocation: Tensor = tensor("length", integer=True)
    bias: Tensor | None = tensor("out", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        invocation: Sequence[int] | Tensor | None = None,
        **attributes: object,
    ) -> Self:
        if invocation is None:
            raise UsageError("no invocation is given", where="invocation", cure="Pass invocation=, a list of token ids")
        A = random((rank, W.shape[1])) / W.shape[1] ** 0.5
        return cls.from_fields(
            A=A, B=W.new_zeros(len(W), rank), invocation=namespace(W).asarray(invocation), **attributes
        )

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        change = layer.mix(layer.mix(x, self.A), self.B)
        change = change if self.bias is None else change + layer.per_channel(self.bias)
        active = self._active(layer.call["input_ids"], x)
        xp = namespace(x)
        added: Tensor = xp.where(active[..., None], self.scaling * change, xp.zeros_like(change))
        return layer(x) + added

    def _active(self, ids: Tensor, x: Tensor) -> Tensor:
        """Return a mask `[rows, tokens]` of the positions of x: True from the start of the last invocation onwards.

        If earlier tokens are in a cache, x covers only the last tokens of `ids`.
        """
        if len(x.shape) != 3 or ids.shape[0] != x.shape[0]:
            why = f"the layer's input has the shape {list(x.shape)}, but the token ids have the shape {list(ids.shape)}"
            raise UsageError(why, cure="Target a layer whose input is [rows, tokens, in]")
        xp = namespace(ids)
        so_far = xp.cumulative_sum(xp.astype(self._begins(ids), ids.dtype), axis=-1)
        active = (so_far > 0) & (so_far == so_far[:, -1:])
        # Compute positions with arrays, not with Python integers, because the length of a sequence is unknown in an
        # exported graph.
        ones = xp.ones_like(x[..., 0])
        count = xp.astype(xp.ones_like(ids), ids.dtype).sum(-1)[:, None]
        places = xp.cumulative_sum(xp.astype(ones, ids.dtype), axis=-1) - 1 + count
        whole = xp.concat([xp.astype(ones * 0, ids.dtype), xp.astype(active, ids.dtype)], axis=-1)
        return xp.take_along_axis(whole, places, axis=-1) > 0

    def _begins(self, ids: Tensor) -> Tensor:
        """Return a mask of the positions in `ids` at which an occurrence of the invocation begins."""
        xp, behind = namespace(ids), len(self.invocation) - 1
        none = 0 * ids[:, :1] - 1
        ids = xp.concat([ids, *[none] * behind], axis=-1)
        begins = ids[:, : -behind or None] == self.invocation[0]
        for place in range(1, behind + 1):
            begins = begins & (ids[:, place : (place - behind) or None] == self.invocation[place])
        return begins
