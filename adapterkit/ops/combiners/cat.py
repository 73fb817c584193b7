"""CAT (LoRA Soups): sum the adapters' changes, with weights that are the softmax of learned logits.

Prabhakar et al. 2024, https://arxiv.org/abs/2410.13025
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._learned import SLOPE, Learned, descend
from .adamerging import PER

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...io.computed import Array
    from ._learned import WeightTrial


class CAT(Learned):
    """sum_t softmax(z)_t D_t. The logits z are learned, and initially equal."""

    title = "Learned concatenation (CAT, LoRA Soups)"
    paper = "https://arxiv.org/abs/2410.13025"
    data: ClassVar[str | None] = SLOPE
    learns: ClassVar[str | None] = "loss_and_gradients"

    per: str = parameter("layer", PER, among=("layer", "task"))
    steps: int = parameter(100, "number of steps of Adam", least=1)
    rate: float = parameter(1e-2, "learning rate of Adam", least=0)

    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        import numpy as np

        start = np.zeros((len(trial.targets), trial.count))
        learned = descend(trial, start, self.steps, self.rate, self.per, _softmax)
        return dict(zip(trial.targets, learned, strict=True))


def _softmax(values: Array) -> tuple[Array, Array]:
    import numpy as np

    powers = np.exp(values - values.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    # The Jacobian of a softmax s is diag(s) - s s^T.
    return shares, shares[:, :, None] * np.eye(shares.shape[1]) - shares[:, :, None] * shares[:, None, :]
