"""The formula of a way to combine, at one target after another; dense results are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..errors import AdapterkitError, UsageError
from .algebra import summed_at
from .at import At
from .building import balanced, dense, low_rank
from .census import Census
from .lowering import Delta
from .methods._learned import Learned, Trial, inner
from .places import side_by_side

if TYPE_CHECKING:
    from ..adapter import Target
    from ..tensors.computed import Array
    from ..tensors.dtypes import DType
    from ..updates import Update
    from .asking import Asked
    from .at_base import Weights
    from .lowering import Change
    from .methods._method import Method
    from .places import Place


class Evaluation:
    """The formula at one target after another."""

    def __init__(
        self, asked: Asked, found: Sequence[Place], dtype: DType, rank: int | str | None, seed: int,
        data: Callable[..., Any] | None, base: Weights | None, factor: float = 1.0,
    ) -> None:  # fmt: skip
        self.asked, self.found, self.dtype, self.rank, self.seed, self.data = asked, found, dtype, rank, seed, data
        self.base, self.factor = base, factor
        self.census = Census()
        self.learned: Mapping[Target, Array] | None = None
        self.asks: Callable[..., Any] | None = None

    def updates(self, read: Sequence[Adapter]) -> dict[Target, tuple[Update, ...]]:
        """The combined updates of every target."""
        method = self.asked.method(self.found[0].target)
        if isinstance(method, Learned):
            self.learned = method.learn(self._trial(read))
        if self.asked.counts:
            self._count()
        made: dict[Target, tuple[Update, ...]] = {}
        if not isinstance(method, Learned):
            self.asks = self._asking(method, read, made)
        for place in self.found:
            try:
                made[place.target] = self._at(place)
            except AdapterkitError as error:
                raise error.at(where=str(place.target)) from None
        return made

    def _count(self) -> None:
        if self.asked.varies:
            why = "what is counted over the whole adapter cannot differ from target to target"
            raise UsageError(why, where="scope", cure="Set scope=tensor, or one value for all targets")

        def once() -> None:
            for place in self.found:
                changes = place.changes()
                for _ in self._matrices(place, changes):
                    pass
                self._bias(place, changes)

        self.census.run(once)

    def _at(self, place: Place) -> tuple[Update, ...]:
        method = self.asked.method(place.target)
        weights = self._weights(place.target)
        sums = method.sums(weights)
        if sums is not None and self.rank is None:
            return summed_at(place, sums, stacking=False)
        changes = place.changes()
        has_weight = any(change is not None and change.changes_weight for change in changes)
        if has_weight and method.dense and self.rank is None:
            return (self._lazily(place, changes),)
        found = list(self._matrices(place, changes)) if has_weight else None
        return (self._stored(place, found, self._bias(place, changes)),)

    def _lazily(self, place: Place, changes: Sequence[Change | None]) -> Update:
        """A dense difference that is computed when it is read: all of them together would be a whole model."""
        import numpy as np

        from ..methods.dense import Dense
        from ..tensors.computed import computed, held

        first = next(change for change in changes if change is not None)
        lead = (first.experts,) if first.experts is not None else ()
        shape, bias = (*lead, *place.shape), self._bias(place, changes)

        def make() -> Array:
            return np.stack([delta.dense() for delta in self._matrices(place, changes)]).reshape(shape)

        d = None if bias is None else held(bias, self.dtype)
        return Dense(D=computed(shape, self.dtype, make), d=d)  # type: ignore[arg-type]

    def _matrices(self, place: Place, changes: Sequence[Change | None]) -> Any:
        """The combined change of each weight: one, or each expert's."""
        method = self.asked.method(place.target)
        for number, row in enumerate(side_by_side(changes)):
            present = tuple(t for t, delta in enumerate(row) if delta is not None)
            deltas = [delta for delta in row if delta is not None]
            at = self._standing(place, present, number if place.target.stacked else None)
            yield self._cut(self._matrix(method, place, at, deltas), deltas)

    def _matrix(self, method: Method, place: Place, at: At, deltas: list[Delta]) -> Delta:
        import numpy as np

        from .methods._changes import whole

        weights = np.array([self._weights(place.target)[t] for t in at.present])
        if len(place.shape) > 1:
            return method.matrix(deltas, weights, at)
        return whole(method.vector(np.stack([delta.dense()[:, 0] for delta in deltas]), weights, at)[:, None])

    def _cut(self, delta: Delta, of: Sequence[Delta]) -> Delta:
        """The result at the rank that was asked for."""
        from .criteria import Criterion
        from .sketching import dominant
        from .thin import svd

        if self.rank is None or self.census.counting or min(delta.shape) == 1:
            return delta
        largest = max(each.rank for each in of) or min(delta.shape)
        rank = min(self.rank if isinstance(self.rank, int) else largest, *delta.shape)
        if delta.rest is not None:
            return Delta(*balanced(*dominant(delta.dense(), Criterion(rank=rank), self.seed)))
        U, S, Vh = svd(delta)
        return Delta(*balanced(U[:, :rank], S[:rank], Vh[:rank]))

    def _bias(self, place: Place, changes: Sequence[Change | None]) -> Array | None:
        """The combined change of the bias, `[out]` or `[e, out]`."""
        import numpy as np

        method = self.asked.method(place.target)
        found = [None if change is None or not change.changes_bias else change.bias() for change in changes]
        present = tuple(t for t, bias in enumerate(found) if bias is not None)
        if not present:
            return None
        weights = np.array([self._weights(place.target)[t] for t in present])
        stacked = np.stack([np.atleast_2d(bias) for bias in found if bias is not None], 1)
        made = [
            method.vector(each, weights, self._standing(place, present, e if place.target.stacked else None, bias=True))
            for e, each in enumerate(stacked)
        ]
        return np.stack(made) if place.target.stacked else made[0]

    def _stored(self, place: Place, found: Sequence[Delta] | None, bias: Array | None) -> Update:
        """An update of what was computed: a LoRA where that is smaller, else a dense difference."""
        if found is None:
            return dense(place.target, place.shape, None, bias, self.dtype)
        rank, (out, columns) = max(delta.rank for delta in found), found[0].shape
        if any(delta.rest is not None for delta in found) or rank * (out + columns) > 2 * out * columns:
            return dense(place.target, place.shape, [delta.dense() for delta in found], bias, self.dtype)
        return low_rank(place.target, place.shape, [_reduced(delta) for delta in found], bias, self.dtype)

    def _standing(self, place: Place, present: tuple[int, ...], expert: int | None, bias: bool = False) -> At:
        part = ("bias" if bias else "weight") + ("" if expert is None else f" {expert}")
        scalings = tuple(_scaling(place.updates[t]) for t in present)
        at = At(place.target, place.shape, present, part, self.seed, self.asked.each, scalings, self.census, self.asks)
        base = self.base
        return at if base is None else replace(at, base=lambda: base.at(place.target, expert, bias))

    def _weights(self, target: Target) -> list[float]:
        if self.learned is None:
            return [weight * self.factor for weight in self.asked.weights_at(target)]
        return [w * float(c) for w, c in zip(self.asked.weights_at(target), self.learned[target], strict=True)]

    def _trial(self, read: Sequence[Adapter]) -> Trial:
        """What a learning method may try: sums with coefficients, by the method's own formula."""
        import numpy as np

        def combined(coefficients: Mapping[Target, Array]) -> Adapter:
            self.learned = coefficients
            return Adapter({place.target: self._at(place) for place in self.found}, read[0].base)

        def products(target: Target, gradient: Any) -> Array:
            place = next(place for place in self.found if place.target == target)
            G = np.asarray(gradient.detach().cpu() if hasattr(gradient, "detach") else gradient, np.float64)
            weights = self.asked.weights_at(target)
            return np.array([w * inner(change, G) for w, change in zip(weights, place.changes(), strict=True)])

        assert self.data is not None
        return Trial([place.target for place in self.found], len(read), self.seed, combined, self.data, products)

    def _asking(self, method: Method, read: Sequence[Adapter], done: Mapping[Target, tuple[Update, ...]]) -> Any:
        if self.data is None or not method.sequential:
            return self.data
        # A view that grows with what is done, so that nothing is copied for each target.
        so_far = Adapter(MappingProxyType(done), read[0].base)
        return lambda position, path: self.data(position, path, so_far if done else None)


def _reduced(delta: Delta) -> tuple[Array, Array]:
    """B and A, at the rank of the weight where there are more."""
    from .thin import svd

    return (delta.B, delta.A) if delta.rank <= min(delta.shape) else balanced(*svd(delta))


def _scaling(updates: Sequence[Update]) -> float | None:
    """The factor beside the one pair of factors that an adapter has at a target, if it has one."""
    return getattr(updates[0], "scaling", None) if len(updates) == 1 else None
