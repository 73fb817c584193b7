"""X-LoRA: y' = y + scaling * sum over e of share_e * strength_e * B_e @ A_e x, with shares from a classifier.

Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148. The input of the classifier is the base model's last
hidden state for the same tokens, computed without the adapter. One classifier serves all layers. Either all layers use
the same logits, or each layer has its own logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.updates import Rule, attribute, tensor
from ..linalg.activations import relu, softmax
from ._routed import Routed, best, mixed, softmax_among

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class XLoRA(Routed):
    """The classifier, and the experts of one layer.

    An update of one layer contains the classifier and the experts. An update of the whole model contains only the
    classifier.
    """

    paper = "https://arxiv.org/abs/2402.07148"
    acts_on = "each token's output (depending on the base model's last hidden state)"
    asks = ("hidden_states",)
    of_model = True
    frozen = frozenset({"A", "B", "strengths"})
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        ((), ("A", "B", "strengths")),
        ((), ("first", "first_bias"), ("first", "first_bias", "inner", "inner_bias")),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="(place + 1) * experts <= logits",
            when="has(A)",
            where="last",
            meaning="the classifier has no logits for this layer",
        ),
    )

    A: Tensor | None = tensor("experts r in", optional=True)
    B: Tensor | None = tensor("experts out r", optional=True)
    strengths: Tensor | None = tensor("experts", optional=True)
    first: Tensor | None = tensor("size hidden", optional=True)
    first_bias: Tensor | None = tensor("size", optional=True)
    inner: Tensor | None = tensor("depth size size", optional=True)
    inner_bias: Tensor | None = tensor("depth size", optional=True)
    last: Tensor = tensor("logits size")
    last_bias: Tensor = tensor("logits")
    place: int = attribute(0, least=0)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = attribute(1.0, positive=True)
    top_k: int = attribute(0, least=0)
    scaling: float = 1.0

    @property
    def channels(self) -> int | None:
        return None if self.A is None else super().channels

    @property
    def lacks_experts(self) -> bool:
        return self.A is None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        assert self.A is not None
        assert self.B is not None
        assert self.strengths is not None
        shares = self._shares(layer.call["hidden_states"], len(self.A)) * self.strengths
        return layer(x) + self.scaling * mixed(x, shares, self.A, self.B, layer)

    def _shares(self, h: Tensor, experts: int) -> Tensor:
        if self.first is not None and self.first_bias is not None:
            h = relu(h @ self.first.mT + self.first_bias)
        if self.inner is not None and self.inner_bias is not None:
            for W, b in zip(self.inner, self.inner_bias, strict=True):
                h = relu(h @ W.mT + b)
        rows = slice(self.place * experts, (self.place + 1) * experts)
        logits = h @ self.last[rows].mT + self.last_bias[rows]
        shares = softmax(logits / self.softmax_temperature) if self.enable_softmax else logits
        shares = shares * best(shares, self.top_k) if self.top_k else shares
        return softmax_among(shares, shares != 0) if self.enable_softmax_topk else shares
