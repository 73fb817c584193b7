"""NSC: learn the weights of a sum of adapters so that each adapter uses as much as possible of its task's inputs.

Lee et al. 2026, https://arxiv.org/abs/2603.26317. An adapter uses an input z only as A z, so it ignores the part of z
in the null space of A. The length of this part, divided by the length of z, is sqrt(1 - z^T A^T (A A^T)^-1 A z / z^T
z). AdamW minimises the mean of this ratio over inputs, tasks, and targets in the last quarter of the layers. Labels and
outputs are not needed. The default steps, start and rate are the authors' values for vision models. For language
models, https://github.com/wonyoung01/nsc_merging uses start=2.4/T, steps=500 and rate=3e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import UsageError
from ..alignment import side_by_side
from ._combiner import parameter
from ._learned import Learned, trained

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...io.computed import Array
    from ..lowering import Delta
    from ._learned import WeightTrial

SPACES = (
    "a callable: score(adapter, spaces) -> (loss, {target's path: gradient of the loss with respect to the weight, "
    "[out, in, *k]}), with loss = spaces.loss(inputs); `inputs` maps pairs (task, path) in spaces.reads to the inputs "
    "[.., in] of the target at this path on the task's samples; task is the index of the task's adapter"
)

RIDGE = 1e-8
"""The number added to the diagonal of A A^T and to z^T z, as in the authors' code."""


class NSC(Learned):
    """sum_t c_t D_t with learned c_t, whose initial value is `start`."""

    title = "Null-space compression (NSC)"
    paper = "https://arxiv.org/abs/2603.26317"
    data: ClassVar[str | None] = SPACES
    learns: ClassVar[str | None] = "inputs_and_spaces"

    blocks: float = parameter(
        0.25, "share of the layers whose inputs are used; 0.25 uses the last quarter", least=0, most=1
    )
    start: float = parameter(0.4, "initial value of every coefficient")
    steps: int = parameter(100, "number of steps of AdamW", least=1)
    rate: float = parameter(1e-3, "learning rate of AdamW", least=0)
    decay: float = parameter(0.01, "weight decay of AdamW", least=0)

    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        import numpy as np

        spaces, score = Spaces(trial, self.blocks), trial.score
        asking: Any = lambda adapter: score(adapter, spaces)  # type: ignore[call-arg]  # noqa: E731
        start = dict.fromkeys(trial.targets, np.full(trial.count, self.start))
        return trained(replace(trial, score=asking), start, self.steps, self.rate, self.decay)


class Spaces:
    """The second argument of the caller's score function; it computes the loss from inputs.

    The object stores the input space of each adapter at each target: the span of the rows of A.

    Attributes:
        paths: the paths of the targets whose inputs are used.
        reads: the pairs (task, path) for which `loss` accepts inputs. The task's adapter changes the target at `path`,
            and `path` is in `paths`.
    """

    def __init__(self, trial: WeightTrial, blocks: float) -> None:
        self.count = trial.count
        self._seen: dict[tuple[int, str], tuple[Array, Array]] = {}
        self.paths = [str(target) for target in trial.targets if self._add(trial, target, blocks)]
        if not self.paths:
            why = f"the last {blocks:.0%} of the layers have no target with low-rank factors"
            raise UsageError(why, where="blocks", cure="Set blocks to a larger share, up to 1")
        self.reads = frozenset(self._seen)

    def _add(self, trial: WeightTrial, target: Target, blocks: float) -> bool:
        import numpy as np

        depth = trial.depth(target)
        # Use targets outside numbered layers, such as the output head of the model, only if `blocks` is 1.
        late = blocks == 1 or (depth is not None and depth >= 1 - blocks)
        if not late or target.stacked:
            return False
        row: Sequence[Delta | None] = next(iter(side_by_side(trial.changes(target))), ())
        if any(delta is not None and (delta.rest is not None or not delta.rank) for delta in row):
            return False
        for task, delta in enumerate(row):
            if delta is not None:
                gram = delta.A @ delta.A.T
                self._seen[task, str(target)] = delta.A, np.linalg.inv(gram + RIDGE * np.eye(len(gram)))
        return True

    def loss(self, inputs: Mapping[tuple[int, str], Any]) -> Any:
        """Return the mean of |n| / |z| over the inputs z, where n is the part of z in the null space of A.

        Args:
            inputs: a map from (task, path) to the inputs `[.., in]` of the target at `path`, from a run of the model
                with the combined adapter. The inputs are numpy arrays, or tensors of a library with numpy's operators
                and `new_tensor`.

        Raises:
            UsageError: `inputs` is empty, or one of its keys is not in `reads`.
        """
        unknown = [key for key in inputs if key not in self._seen]
        if unknown or not inputs:
            where = ", ".join(map(str, unknown[0])) if unknown else "inputs"
            why = "spaces.loss got no inputs, or inputs whose (task, path) is not in spaces.reads"
            raise UsageError(why, where=where, cure="Pass inputs for pairs in spaces.reads")
        shares = [self._share(key, z) for key, z in inputs.items()]
        return sum(shares[1:], shares[0]) / len(shares)

    def _share(self, key: tuple[int, str], z: Any) -> Any:
        like = z.new_tensor if hasattr(z, "new_tensor") else lambda values: values
        A, inverse = (like(values) for values in self._seen[key])
        seen = z @ A.T
        square = 1 - (seen * (seen @ inverse)).sum(-1) / ((z * z).sum(-1) + RIDGE)
        # Clip just above zero, because rounding may yield a negative number, which has no square root. At zero, the
        # derivative of the square root is infinite.
        return (square.clip(1e-12) ** 0.5).mean()
