"""X-LoRA: y' = y + scaling * sum over e of share_e * strength_e * B_e @ A_e x, shares by a classifier of the call.

Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148. The classifier reads what the model's last layer gives for
the same tokens without the adapter. It is one for all layers, with logits for all of them or for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Malformed, ShapeMismatch
from ..tensors.activations import relu, softmax
from ..tensors.namespace import namespace
from ..updates import attribute, tensor
from ._routed import Routed, best, mixed

if TYPE_CHECKING:
    from torch import Tensor


class XLoRA(Routed):
    """The classifier, at the whole model; with its experts, at each layer that these change."""

    paper = "https://arxiv.org/abs/2402.07148"
    acts_on = "each token by what the model makes of it"
    asks = ("hidden_states",)
    of_model = True
    frozen = frozenset({"A", "B", "strengths"})
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        ((), ("A", "B", "strengths")),
        ((), ("first", "first_bias"), ("first", "first_bias", "inner", "inner_bias")),
    )

    A: Tensor | None = tensor("experts r in", optional=True)
    B: Tensor | None = tensor("experts out r", optional=True)
    strengths: Tensor | None = tensor("experts", optional=True)
    first: Tensor | None = tensor("size hidden", optional=True)
    first_bias: Tensor | None = tensor("size", optional=True)
    inner: Tensor | None = tensor("depth size size", optional=True)
    inner_bias: Tensor | None = tensor("depth size", optional=True)
    last: Tensor = tensor("logits width")
    last_bias: Tensor = tensor("logits")
    place: int = attribute(0, least=0)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    top_k: int = attribute(0, least=0)
    scaling: float = 1.0

    @property
    def channels(self) -> int | None:
        return None if self.A is None else super().channels

    @property
    def lacks_experts(self) -> bool:
        return self.A is None

    def check(self) -> None:
        super().check()
        if not self.softmax_temperature > 0:
            why = f"a temperature of {self.softmax_temperature}"
            raise Malformed(why, where="softmax_temperature", cure=_AGAIN)
        self._check_sizes()

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.first is not None and self.first.shape[:1] != self.last.shape[-1:]:
            raise ShapeMismatch("reads another width than the layer before it gives", where="last", cure=_AGAIN)
        if self.A is not None and (self.place + 1) * self.A.shape[0] > self.last.shape[0]:
            why = f"{self.last.shape[0]} logits for place {self.place} of {self.A.shape[0]} experts"
            raise ShapeMismatch(why, where="last", cure=_AGAIN)

    def forward(self, x: Any, layer: Any) -> Any:
        assert self.A is not None
        assert self.B is not None
        shares = self._shares(layer.call["hidden_states"], len(self.A)) * self.strengths
        return layer(x) + self.scaling * mixed(x, shares, self.A, self.B, layer)

    def _shares(self, h: Any, experts: int) -> Any:
        if self.first is not None:
            h = relu(h @ self.first.mT + self.first_bias)
        if self.inner is not None and self.inner_bias is not None:
            for W, b in zip(self.inner, self.inner_bias, strict=True):
                h = relu(h @ W.mT + b)
        own = slice(self.place * experts, (self.place + 1) * experts)
        logits = h @ self.last[own].mT + self.last_bias[own]
        shares = softmax(logits / self.softmax_temperature) if self.enable_softmax else logits
        shares = shares * best(shares, self.top_k) if self.top_k else shares
        if not self.enable_softmax_topk:
            return shares
        xp = namespace(shares)
        chosen = shares != 0
        return xp.where(chosen, softmax(xp.where(chosen, shares, -xp.inf)), 0.0)


_AGAIN = "Write the adapter again"
