"""Activated LoRA: y' = y + scaling * B @ A x, from the last invocation in each row of the batch to the row's end.

Greenewald et al. 2025, https://arxiv.org/abs/2504.12397. An invocation is a given sequence of token ids. Positions
before the last invocation, and rows without an invocation, keep the base's output. So a cache that the base computed is
valid for these positions.
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
    """y' = y + scaling * (B @ A x + bias), beginning with a row's last invocation; x is `[rows, tokens, in]`."""

    paper = "https://arxiv.org/abs/2504.12397"
    acts_on = "the output after the invocation tokens only"
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
            raise UsageError(
                "no invocation given", where="invocation", cure="Pass invocation=, a list of token numbers"
            )
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
        """Return a mask of the positions of x that do not precede the last invocation.

        The input x contains the last tokens of the sequence.
        """
        if len(x.shape) != 3 or ids.shape[0] != x.shape[0]:
            why = f"the layer's input is {list(x.shape)}, but the model reads {list(ids.shape)} tokens"
            raise UsageError(why, cure="Target a layer whose input is [rows, tokens, in]")
        xp = namespace(ids)
        so_far = xp.cumulative_sum(xp.astype(self._begins(ids), ids.dtype), axis=-1)
        active = (so_far > 0) & (so_far == so_far[:, -1:])
        # Compute with arrays of positions instead of lengths, because the length of a sequence is unknown in an
        # exported graph.
        ones = xp.ones_like(x[..., 0])
        count = xp.astype(xp.ones_like(ids), ids.dtype).sum(-1)[:, None]
        places = xp.cumulative_sum(xp.astype(ones, ids.dtype), axis=-1) - 1 + count
        whole = xp.concat([xp.astype(ones * 0, ids.dtype), xp.astype(active, ids.dtype)], axis=-1)
        return xp.take_along_axis(whole, places, axis=-1) > 0

    def _begins(self, ids: Tensor) -> Tensor:
        """Return a mask of the positions at which an invocation begins."""
        xp, behind = namespace(ids), len(self.invocation) - 1
        none = 0 * ids[:, :1] - 1
        ids = xp.concat([ids, *[none] * behind], axis=-1)
        begins = ids[:, : -behind or None] == self.invocation[0]
        for place in range(1, behind + 1):
            begins = begins & (ids[:, place : (place - behind) or None] == self.invocation[place])
        return begins
