"""Base class and optimisers of methods that learn coefficients. The caller computes the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat

from ...errors import UsageError
from ._combiner import Combiner, mixed

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Change, Delta

    Coefficients = Mapping[Target, Array]

SCORE = "a callable: score(adapter) -> loss"
SLOPE = (
    "a callable: score(adapter) -> (loss, {target's path: gradient of the loss with respect to the weight, "
    "[out, in, *k]})"
)


@dataclass(frozen=True, slots=True, eq=False)
class WeightTrial:
    """The functions that a learning combiner needs to evaluate coefficients.

    Attributes:
        targets: all targets, in the order of the result.
        count: the number of adapters, T.
        seed: the seed of random steps.
        combined: a function that returns the combined adapter. Its argument maps each target to its coefficients `[T]`.
        score: the function from the caller. It takes an adapter, and returns the loss, or the loss and gradients.
        products: a function of (target, gradient `[out, in, *k]`). It returns `[T]`: for each coefficient, the inner
            product of the gradient with the change that the coefficient multiplies.
        changes: a function from a target to the adapters' changes; a change is None if the adapter lacks the target.
        depth: a function from a target to its depth, 0 in the first layer and 1 in the last; None outside numbered
            layers.
        each: for each adapter, the parameters that apply to this adapter only.
        wanted: a description of the score function that the caller must pass, for error texts.
    """

    targets: Sequence[Target]
    count: int
    seed: int
    combined: Callable[[Coefficients], Adapter]
    score: Callable[[Adapter], Any]
    products: Callable[[Target, Any], Array]
    changes: Callable[[Target], Sequence[Change | None]]
    depth: Callable[[Target], float | None]
    each: Sequence[Mapping[str, Any]] = ()
    wanted: str = SLOPE

    def everywhere(self, coefficients: Array) -> dict[Target, Array]:
        return dict.fromkeys(self.targets, coefficients)

    def loss(self, coefficients: Coefficients) -> float:
        score = self.score(self.combined(coefficients))
        return _number(score[0] if isinstance(score, tuple) else score)

    def slope(self, coefficients: Coefficients) -> tuple[float, dict[Target, Array]]:
        """Return the loss, and a map from each target to the gradient of the loss with respect to its coefficients.

        Each gradient has the shape `[T]`. The map lacks targets for which the score function returns no gradient.

        Raises:
            UsageError: the score function returns no gradients, or a gradient for a path that is not a target.
        """
        answer = self.score(self.combined(coefficients))
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], Mapping):
            raise UsageError(
                "the score function returned no gradients", where="data", cure=f"data= must be {self.wanted}"
            )
        unknown = set(answer[1]) - {str(target) for target in self.targets}
        if unknown:
            raise UsageError(
                "the score function returned a gradient for a path that is not a target",
                where=sorted(unknown)[0],
                cure="Use the paths of the targets as the keys of the gradients",
            )
        # torch returns None as the gradient of a weight on which the loss does not depend.
        given = {target: answer[1].get(str(target)) for target in self.targets}
        slopes = {target: self.products(target, G) for target, G in given.items() if G is not None}
        return _number(answer[0]), slopes

    def differences(self, coefficients: Array, step: float = 1e-3) -> tuple[float, Array]:
        """Return the loss and its gradient `[T]`, computed by central differences. All targets share `coefficients`."""
        import numpy as np

        # This calls the score function 2 T + 1 times. If each target had its own coefficients, far more calls would be
        # needed.
        ends = [
            [self.loss(self.everywhere(coefficients + way * step * unit)) for way in (1, -1)]
            for unit in np.eye(self.count)
        ]
        slope = np.array([(up - down) / (2 * step) for up, down in ends])
        return self.loss(self.everywhere(coefficients)), slope


class Learned(Combiner):
    """A combiner that first learns the coefficients of a sum from the caller's loss.

    Attributes:
        by_part: whether each coefficient multiplies only a part of a change, such as one direction. If so, `matrix`
            must read the coefficients from `at.learned`. Otherwise, each coefficient multiplies an adapter's whole
            change, and `matrix` gets it as a weight.
    """

    data: ClassVar[str | None] = SCORE
    learns: ClassVar[str | None] = "loss"
    by_part: ClassVar[bool] = False

    @abstractmethod
    def learn(self, trial: WeightTrial) -> dict[Target, Array]:
        """Learn the coefficients; return a map from each target to its coefficients `[T]`."""

    def products(self, changes: Sequence[Change | None], weights: Sequence[float], G: Array) -> Array:
        """Return the derivatives of the inner product <G, result> with respect to the coefficients of one target."""
        import numpy as np

        return np.array([w * inner(change, G) for w, change in zip(weights, changes, strict=True)])

    def sums(self, weights: Sequence[float]) -> list[float] | None:
        return list(weights)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return mixed(deltas, weights)

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return weights @ changes


class Adam:
    """The optimiser Adam for one array (Kingma and Ba 2014, https://arxiv.org/abs/1412.6980)."""

    def __init__(self, rate: float, decay: tuple[float, float] = (0.9, 0.999)) -> None:
        self.rate, self.decay, self.steps = rate, decay, 0
        self.mean: Any = 0.0
        self.square: Any = 0.0

    def step(self, values: Array, slope: Array) -> Array:
        import numpy as np

        self.steps += 1
        one, two = self.decay
        self.mean = one * self.mean + (1 - one) * slope
        self.square = two * self.square + (1 - two) * slope * slope
        mean, square = self.mean / (1 - one**self.steps), self.square / (1 - two**self.steps)
        moved: Array = values - self.rate * mean / (np.sqrt(square) + 1e-8)
        return moved


def descend(
    trial: WeightTrial, start: Array, steps: int, rate: float, per: str, shape: Callable[[Array], tuple[Array, Array]]
) -> Array:
    """Run Adam on free parameters `[targets, T]`; return the coefficients of the step with the least loss.

    Args:
        trial: the functions that evaluate coefficients.
        start: the initial free parameters.
        steps: the number of steps.
        rate: the learning rate.
        per: `task` if all targets share the same coefficients; the gradient is then computed by finite differences.
            With `layer`, each target has its own coefficients, and the score function returns gradients.
        shape: a function that takes the free parameters, and returns (coefficients `[targets, T]`, their Jacobian
            `[targets, T, T]`).
    """
    import numpy as np

    values, adam = start, Adam(rate)
    best, least = values, np.inf
    for _ in range(steps + 1):
        coefficients, jacobian = shape(values)
        if per == "task":
            loss, one = trial.differences(coefficients[0])
            slope = np.tile(one, (len(values), 1))
        else:
            loss, gradients = trial.slope(dict(zip(trial.targets, coefficients, strict=True)))
            slope = np.stack([gradients.get(target, np.zeros(trial.count)) for target in trial.targets])
        if loss < least:
            best, least = values, loss
        values = adam.step(values, np.einsum("lij,lj->li", jacobian, slope))
    return shape(best)[0]


def trained(trial: WeightTrial, start: Coefficients, steps: int, rate: float, decay: float) -> dict[Target, Array]:
    """Run AdamW on the coefficients of each target; return the coefficients after the last step.

    As in torch, a step does not change the coefficients of targets without a gradient.
    """
    values, adams = dict(start), {target: Adam(rate) for target in start}
    for _ in range(steps):
        _, slopes = trial.slope(dict(values))
        for target, slope in slopes.items():
            values[target] = adams[target].step(values[target] * (1 - rate * decay), slope)
    return values


def inner(change: Change | None, G: Array) -> float:
    """Return the inner product of a change D with G, without computing `B @ A`.

    G has the shape `[out, in * k]`, or `[e, out, in * k]` for stacked experts.
    """
    if change is None or not change.changes_weight:
        return 0.0
    total = 0.0
    for expert, delta in enumerate(change.deltas()):
        g = (G[expert] if change.experts is not None else G).reshape(delta.shape)
        total += float(((delta.B.T @ g) * delta.A).sum())
        total += 0.0 if delta.rest is None else float((delta.rest * g).sum())
    return total


def _number(value: SupportsFloat) -> float:
    import math

    loss = float(value)
    if not math.isfinite(loss):
        raise UsageError(
            f"the score function returned the loss {loss}, which is not a finite number",
            where="data",
            cure="Change the score function so that it always returns a finite loss",
        )
    return loss
