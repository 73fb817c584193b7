"""Arrow: y' = y + scaling * sum over e of share_e * strength_e * B_e @ A_e x, with shares from the experts' prototypes.

Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157. An expert's prototype is the input direction that B_e @ A_e
amplifies most: the first right singular vector of B_e @ A_e. With general knowledge subtraction (Vahidifar et al. 2025,
https://aclanthology.org/2025.acl-short.54), the mean of the general experts' A and B has already been subtracted from
each expert's A and B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.updates import Rule, attribute, tensor
from ._routed import Routed, best, mixed, softmax_among

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class Arrow(Routed):
    """Uses, for each token x, the `top_k` experts with the largest |prototype_e x|; the other experts have share 0.

    The shares are the softmax of |prototype_e x| / temperature over these experts. A file that contains only the router
    has no experts. Instead, the file has one pair of factors, `idle_A` and `idle_B`, which no formula uses. `tasks` is
    the number of experts that the router needs. `general` is the number of general experts.
    """

    paper = "https://arxiv.org/abs/2405.11157"
    acts_on = "each token's output (depending on the token's similarity to the experts)"
    frozen = frozenset({"prototypes", "strengths", "idle_A", "idle_B"})
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        (("A", "B", "prototypes", "strengths"), ("idle_A", "idle_B")),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="top_k <= experts",
            when="has(A)",
            where="top_k",
            error="Malformed",
            meaning="top_k is larger than the number of experts",
        ),
        Rule(
            require="top_k <= tasks",
            when="not has(A) and tasks > 0",
            where="top_k",
            error="Malformed",
            meaning="top_k is larger than the number of experts",
        ),
    )

    A: Tensor | None = tensor("experts r in", optional=True)
    B: Tensor | None = tensor("experts out r", optional=True)
    prototypes: Tensor | None = tensor("experts in", optional=True)
    strengths: Tensor | None = tensor("experts", optional=True)
    idle_A: Tensor | None = tensor("r in", optional=True)
    idle_B: Tensor | None = tensor("out r", optional=True)
    top_k: int = attribute(1, least=1)
    temperature: float = attribute(1.0, positive=True)
    scaling: float = 1.0
    tasks: int = attribute(0, least=0)
    general: int = attribute(0, least=0)

    @property
    def lacks_experts(self) -> bool:
        return self.A is None

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        self.dims()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        assert self.A is not None
        assert self.B is not None
        assert self.prototypes is not None
        assert self.strengths is not None
        likeness = abs(layer.mix(x, self.prototypes))
        shares = softmax_among(likeness / self.temperature, best(likeness, self.top_k)) * self.strengths
        return layer(x) + self.scaling * mixed(x, shares, self.A, self.B, layer)
