"""AdaMerging: sum the adapters' changes, with coefficients that are learned by minimising a loss.

The loss is usually the entropy on unlabelled samples.

Yang et al. 2023, https://arxiv.org/abs/2310.02575
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._learned import SLOPE, Learned, descend

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...io.computed import Array
    from ._learned import WeightTrial

PER = "whether each task has one coefficient for each target (layer; needs gradients), or one for all targets (task)"


class AdaMerging(Learned):
    """sum_t c_t D_t; Adam learns c, and all coefficients start with the value `start`."""

    title = "AdaMerging coefficients"
    paper = "https://arxiv.org/abs/2310.02575"
    data: ClassVar[str | None] = SLOPE
    learns: ClassVar[str | None] = "entropy_and_gradients"

    per: str = parameter("layer", PER, among=("layer", "task"))
    start: float = parameter(0.3, "initial value of all coefficients")
    steps: int = parameter(500, "steps of Adam", least=1)
    rate: float = parameter(1e-3, "learning rate of Adam", least=0)

    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        import numpy as np

        start = np.full((len(trial.targets), trial.count), self.start)
        learned = descend(trial, start, self.steps, self.rate, self.per, _as_they_are)
        return dict(zip(trial.targets, learned, strict=True))


def _as_they_are(values: Array) -> tuple[Array, Array]:
    import numpy as np

    # The coefficients are the free parameters themselves, so their Jacobian is the identity.
    return values, np.broadcast_to(np.eye(values.shape[1]), (*values.shape, values.shape[1]))
