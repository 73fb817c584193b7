"""One adapter of several, by any of the methods in `methods/`: what is asked is settled here, formulas are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..errors import AdapterkitError, UsageError
from .algebra import summed_at
from .asking import Asked, one_of
from .at import At
from .building import balanced, dense, low_rank, of_several, result_type
from .census import Census
from .lowering import Delta
from .methods import COMBINERS
from .methods._learned import Learned, Trial, inner
from .methods._method import Method, made
from .peers import resolved
from .places import Place, places, side_by_side

if TYPE_CHECKING:
    from ..adapter import Target
    from ..tensors.computed import Array
    from ..tensors.dtypes import DType
    from ..updates import Update
    from .lowering import Base, Change
    from .places import Source


def combine(
    adapters: Sequence[Source],
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Base | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    compat: str | None = None,
    data: Callable[..., Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    disjoint: bool = False,
    **parameters: Any,
) -> Adapter:
    """One adapter made of several.

    Args:
        adapters: adapters or their paths, of any additive methods, ranks and targets. One that has nothing at a target
            takes no part there.
        method: a name in `COMBINERS`; a plug-in and another method may be put together, `knots_ties`.
        weights: one an adapter, 1 if not given. Each a number, a list of numbers from the first layer to the last, or
            a mapping of globs of targets to either; the first glob that fits counts, and where none does it is 1.
        base: settles names and layouts, and is what laws that need weights are taken at.
        rank: cut the result to it: the best approximation, target by target.
        dtype: the type of computed results; float32 where not given, float64 where a tensor is of it.
        seed: of what a method draws at random, together with target and adapter's position alone.
        compat: `mergekit` or `peft`: their names, their choices.
        data: for methods that look at samples or scores; `COMBINERS[name].data` says what it must be.
        each: parameters of single adapters, one mapping an adapter: `[{"density": 0.5}, {}]`.
        disjoint: adapters that share no target are meant to.
        parameters: the method's; given like weights.

    Returns:
        LoRA where the method works on factors, else a dense difference, computed when it is read.

    Raises:
        Unsupported: an unknown method or peer.
        UsageError: weights, parameters or data that do not fit; no common targets; a rank above the possible.
        NotMergeable: a law is not one of weights.
        ShapeMismatch: adapters are of different weights.
        Malformed: a NaN or an infinity.
    """
    if isinstance(adapters, (str, Adapter)):
        raise UsageError("one adapter where a list belongs", cure="Pass a list of adapters")
    name, values = resolved(method, compat)
    values |= parameters
    cut = values.pop("rank", None)
    if "rank" in COMBINERS[name].parameters():
        values |= {} if rank is None else {"rank": rank}
    else:
        cut = cut if rank is None else rank
    _check_data(name, data)
    if not adapters:
        raise UsageError("no adapter was given", cure="Name at least one")
    low, high = COMBINERS[name].takes
    if not low <= len(adapters) <= (len(adapters) if high is None else high):
        raise UsageError(f"{name} takes {low} adapters, not {len(adapters)}", cure="Choose another method")
    first = made(COMBINERS[name], {key: one_of(value, key) for key, value in values.items()})
    summing = first.sums([1.0] * len(adapters)) is not None
    read, found = places(adapters, base=base, lower=None if summing else "combined", disjoint=disjoint)
    asked = Asked(name, values, weights, each, found, len(read))
    work = _Work(asked, found, result_type(read, dtype), cut, seed, data)
    updates = work.updates(read)
    said = {
        "method": name, "parameters": asked.record(first), "weights": asked.weights, "seed": seed,
        "each": [dict(own) for own in asked.each], "rank": cut, "compat": compat,
    }  # fmt: skip
    return of_several(
        read, updates, "combine", **{key: value for key, value in said.items() if value not in (None, [])}
    )


class _Work:
    """The formula at one target after another."""

    def __init__(
        self, asked: Asked, found: Sequence[Place], dtype: DType, rank: Any, seed: int, data: Callable[..., Any] | None
    ) -> None:
        self.asked, self.found, self.dtype, self.rank, self.seed, self.data = asked, found, dtype, rank, seed, data
        self.census = Census()
        self.learned: Mapping[Target, Array] | None = None
        self.asks: Callable[..., Any] | None = None
        if isinstance(rank, int):
            _check_rank(rank, found)

    def updates(self, read: Sequence[Adapter]) -> dict[Target, tuple[Update, ...]]:
        """The combined updates of every target."""
        method = self.asked.method(self.found[0].target)
        if isinstance(method, Learned):
            self.learned = method.learn(self._trial(read))
        if method.counts:
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
        for expert, row in enumerate(side_by_side(changes)):
            present = tuple(t for t, delta in enumerate(row) if delta is not None)
            deltas = [delta for delta in row if delta is not None]
            part = f"weight {expert}" if place.target.stacked else "weight"
            yield self._cut(self._matrix(method, place, present, deltas, part), deltas)

    def _matrix(self, method: Method, place: Place, present: tuple[int, ...], deltas: list[Delta], part: str) -> Delta:
        import numpy as np

        from .methods._method import whole

        at = self._standing(place, present, part)
        weights = np.array([self._weights(place.target)[t] for t in present])
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
        rank = min(max(each.rank for each in of) if self.rank == "largest" else self.rank, *delta.shape) or min(
            delta.shape
        )
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
        stacked = np.stack([np.atleast_2d(found[t]) for t in present], 1)  # type: ignore[arg-type]
        parts = ["bias"] if not place.target.stacked else [f"bias {expert}" for expert in range(len(stacked))]
        made = [
            method.vector(each, weights, self._standing(place, present, part))
            for each, part in zip(stacked, parts, strict=True)
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

    def _standing(self, place: Place, present: tuple[int, ...], part: str) -> At:
        scalings = tuple(_scaling(place.updates[t]) for t in present)
        return At(
            place.target, place.shape, present, part, self.seed, self.asked.each, scalings, self.census, self.asks
        )

    def _weights(self, target: Target) -> list[float]:
        if self.learned is None:
            return self.asked.weights_at(target)
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


def _check_data(name: str, data: Any) -> None:
    wanted = COMBINERS[name].data
    if wanted is not None and not callable(data):
        raise UsageError(f"{name} needs data", where="data", cure=f"data= must be {wanted}")
    if wanted is None and data is not None:
        raise UsageError(f"{name} looks at no data", where="data", cure="Leave it out, or choose another method")


def _check_rank(rank: Any, found: Sequence[Place]) -> None:
    most = max(min(place.shape[0], math.prod(place.shape[1:])) for place in found)
    if isinstance(rank, bool) or not 1 <= rank <= most:
        raise UsageError(f"rank {rank} of weights of rank {most} at most", where="rank", cure="Choose another")
