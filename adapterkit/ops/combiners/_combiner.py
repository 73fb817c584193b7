"""Base classes of combiners. A combiner is a formula over the changes of one weight, with parameters."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast, dataclass_transform

from ...errors import UsageError, nearest
from ...linalg.namespace import summed
from ..lowering import Delta

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext

    Decomposition = tuple[Array, Array, Array]

    Value = bool | int | float | str | None

# Functions of the changes of one weight. They compute inner products, sums, singular vectors, polar factors and
# numerical ranks.


TINY = 1e-12
"""A sum of weights counts as zero if it is below this fraction of the sum of their magnitudes."""

NOISE = 1e-13
"""Singular values below this fraction of the largest singular value count as rounding noise."""


def shares(weights: Array) -> Array:
    """Divide weights by their sum.

    Raises:
        UsageError: the sum is zero.
    """
    whole = weights.sum()
    if abs(whole) < TINY * abs(weights).sum() or whole == 0:
        raise UsageError("the weights sum to 0", where="weights", cure="Choose weights whose sum is not 0")
    result: Array = weights / whole
    return result


def gram(deltas: Sequence[Delta]) -> Array:
    """Return the inner products `<D_s, D_t>` of all pairs of changes, `[T, T]`, without computing `B @ A`."""
    import numpy as np

    if any(delta.rest is not None for delta in deltas):
        flat = np.stack([delta.dense().ravel() for delta in deltas])
        product: Array = flat @ flat.T
        return product
    # `<B_s A_s, B_t A_t>` is the sum of the entries of `(B_s^T B_t) * (A_s A_t^T)`. Both matrices have the shape
    # `[rank of s, rank of t]`, so they are much smaller than the weight.
    products = np.empty((len(deltas), len(deltas)))
    for s, one in enumerate(deltas):
        for t, other in enumerate(deltas[: s + 1]):
            products[s, t] = products[t, s] = float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())
    return products


def mixed(deltas: Sequence[Delta], coefficients: Array) -> Delta:
    """Return the change `sum_t coefficients[t] * D_t`. Its factors are the scaled, concatenated factors of the D_t."""
    import numpy as np

    scaled = [delta.scaled(float(c)) for delta, c in zip(deltas, coefficients, strict=True)]
    rests = [delta.rest for delta in scaled if delta.rest is not None]
    B, A = np.hstack([delta.B for delta in scaled]), np.vstack([delta.A for delta in scaled])
    return Delta(B, A, summed(rests) if rests else None)


def whole(D: Array) -> Delta:
    """Return the array `[out, in * k]` as a change without low-rank factors."""
    import numpy as np

    return Delta(np.zeros((len(D), 0)), np.zeros((0, D.shape[1])), D)


def between(left: Array, core: Array, right: Array) -> Delta:
    """Return `left @ core @ right` as a change with the factors B and A.

    The factors come from the core's SVD, with `sqrt(S)` in each factor. Singular values that are only rounding noise
    are dropped.
    """
    import numpy as np

    U, S, Vh = np.linalg.svd(core, full_matrices=False)
    kept = max(int((NOISE * S[:1].max(initial=0) < S).sum()), 1)
    root = np.sqrt(S[:kept])
    return Delta(left @ (U[:, :kept] * root), (root[:, None] * Vh[:kept]) @ right)


def leading(M: Array, count: int | None = None) -> Decomposition:
    """Return U `[p, k]`, S `[k]` and Vh `[k, q]`: the first k singular vectors and values of M.

    k is the number of singular values above rounding noise, but at most `count`.
    """
    import numpy as np

    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    rank = int((NOISE * S[:1].max(initial=0) < S).sum())
    kept = rank if count is None else min(rank, count)
    return U[:, :kept], S[:kept], Vh[:kept]


def spanned(cores: Array) -> int:
    """Return the dimension of the span of all cores' columns or of all cores' rows, whichever is smaller."""
    import numpy as np

    # The cores' shapes do not determine the dimensions. The cores of dense changes have the shape of the weight, and
    # the columns of low-rank factors may be linearly dependent.
    both = (np.linalg.svd(side, compute_uv=False) for side in (np.hstack([*cores]), np.vstack([*cores])))
    return min(int((NOISE * S[:1].max(initial=0) < S).sum()) for S in both)


def polar(X: Array) -> Array:
    """Return the matrix with orthonormal columns (or rows, if X is wide) that is nearest to X."""
    import numpy as np

    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    nearest: Array = U @ Vh
    return nearest


def joined(parts: list[Decomposition]) -> Decomposition:
    """Concatenate several singular value decompositions, and make all their singular vectors orthonormal."""
    import numpy as np

    # Directions of different tasks are not orthogonal. The polar factor is the nearest matrix with orthonormal columns.
    U, S, Vh = zip(*parts, strict=True)
    return polar(np.hstack(U)), np.concatenate(S), polar(np.vstack(Vh))


# The base classes.


def parameter(
    default: Value,
    meaning: str,
    *,
    among: Sequence[str] = (),
    least: float = -math.inf,
    most: float = math.inf,
    kind: type | None = None,
) -> Any:
    """Return a dataclass field for a parameter that the user may set.

    Args:
        default: the default value, from the paper. Its type is the parameter's type, unless `kind` is given.
        meaning: a description for help texts and tables.
        among: the allowed values; empty allows all.
        least: the smallest allowed number.
        most: the largest allowed number.
        kind: the type, if the default is None.
    """
    facts = {"meaning": meaning, "among": tuple(among), "least": least, "most": most, "kind": kind or type(default)}
    return dataclasses.field(default=default, metadata=facts)


DEPENDENCES = {
    "factors": "how a change was split into B and A",
    "order": "the order of the adapters",
    "size": "fixed thresholds for magnitudes: doubled changes do not give a doubled result",
    "seed": "random numbers",
}
"""The keys that `Combiner.depends` may contain, each with a description of the dependence.

Tests check that each combiner's `depends` is right.
"""


@dataclass_transform(frozen_default=True, field_specifiers=(parameter,), kw_only_default=True)
class Combiner(ABC):
    """A formula that combines several changes of a weight into one change.

    Subclasses are frozen dataclasses of parameters.

    Attributes:
        title: the method's name in tables and documentation.
        paper: the source of the formula.
        data: a description of the `data=` argument, for methods that need more than the adapters.
        learns: the method of `searching.TextData` that computes `data=` from texts; None if texts do not suffice.
        takes: (smallest, largest) allowed number of adapters; None for the largest means no limit.
        dense: whether the result lacks low-rank factors even if all changes have them.
        compat: a map from a peer library to the parameter values that reproduce the peer's results.
        plug: the parameter that names the inner combiner; None if the combiner has none.
        single: the names of the parameters that may have a different value for each adapter.
        based: whether the formula needs the weights of the base.
        depends: what the result depends on in addition to the changes; keys of `DEPENDENCES`.
        stages: how many times the formula searches all targets for thresholds. Each search may use the results of the
            earlier searches. 0 if the formula needs only sums over all targets.
        sequential: whether targets are computed in order. If so, the third argument of the function `data` is an
            adapter with the targets that have already been computed.
    """

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    data: ClassVar[str | None] = None
    learns: ClassVar[str | None] = None
    takes: ClassVar[tuple[int, int | None]] = (1, None)
    compat: ClassVar[Mapping[str, Mapping[str, Value]]] = {}
    plug: ClassVar[str | None] = None
    single: ClassVar[frozenset[str]] = frozenset()
    based: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    stages: ClassVar[int] = 1
    depends: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        # Make each subclass a dataclass here. Otherwise, if the author of a plug-in package forgets the `@dataclass`
        # decorator, the combiner silently loses its parameters.
        super().__init_subclass__()
        dataclass(frozen=True, kw_only=True, eq=False)(cls)

    @classmethod
    def parameters(cls) -> dict[str, dataclasses.Field[Value]]:
        """Return a map from each parameter's name to its field, whose `metadata` are the arguments of `parameter`."""
        return {f.name: f for f in dataclasses.fields(cls) if "meaning" in f.metadata}  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Return the default of every parameter; for a `PlugIn`, include the default of `then`."""
        defaults = {name: cast("Value", field.default) for name, field in cls.parameters().items()}
        return {"then": vars(cls()).get("then"), **defaults} if cls.plug else defaults

    @classmethod
    def checked(cls, name: str, value: object) -> Value:
        """Check a value for a parameter; return the value, converted to the parameter's type.

        Raises:
            UsageError: the combiner has no such parameter, or the value is not allowed.
        """
        known = cls.parameters()
        if name not in known:
            cure = nearest(name, known) or f"The method's parameters: {', '.join(known) or 'none'}"
            raise UsageError(f"this method has no parameter {name!r}", where=name, cure=cure)
        facts = known[name].metadata
        if value is None and known[name].default is None:
            return None
        fits = _typed(value, facts["kind"])
        if fits is None:
            raise UsageError(f"{value!r} is not {_KINDS[facts['kind']]}", where=name, cure=_default_text(known[name]))
        outside = not isinstance(fits, (bool, str)) and not facts["least"] <= fits <= facts["most"]
        if outside or (facts["among"] and fits not in facts["among"]):
            raise UsageError(f"{value!r} is not allowed", where=name, cure=_default_text(known[name]))
        return fits

    def values(self) -> dict[str, Value]:
        """Return a map from the names of the parameters to their values."""
        return {name: getattr(self, name) for name in self.parameters()}

    @property
    def dense(self) -> bool:
        return False

    @property
    def counts(self) -> bool:
        """Whether the formula needs statistics of whole adapters (a `Census`) before any target can be computed."""
        return False

    def sums(self, weights: Sequence[float]) -> list[float] | None:
        """Return each adapter's factor if the formula is a weighted sum of the changes; None for other formulas."""
        return None

    def check(self) -> None:  # noqa: B027 - by default, no parameter values conflict
        """Raise UsageError if parameter values that are allowed separately are not allowed together."""

    @abstractmethod
    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        """Return the combined change of a weight.

        Args:
            deltas: the changes of one weight, one per adapter that changes it.
            weights: for each change, the weight of its adapter in the formula, `[T]`.
            at: the context of the formula: the target, random numbers, and statistics of whole adapters.
        """

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        """Combine the changes of a bias, `[T, out]`, into one change, `[out]`: by default, `sum_t w_t * d_t / T`."""
        return weights @ changes / len(changes)


class Mixture(Combiner):
    """Combiners with the result `sum_t c_t * D_t`, where `c` depends only on inner products of the changes."""

    @abstractmethod
    def coefficients(self, gram: Array, weights: Array) -> Array:
        """Compute c `[T]` from the inner products of the changes, `[T, T]`, and from the weights, `[T]`."""

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return mixed(deltas, self.coefficients(gram(deltas), weights))

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self.coefficients(changes @ changes.T, weights) @ changes


class Spectral(Combiner):
    """Combiners whose formula gets cores `[T, p, q]`. Change t is `left @ cores[t] @ right`.

    `left` and `right` are the same matrices for all changes. The cores are small if all changes have low-rank factors.
    """

    @abstractmethod
    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        """Return the combined core, `[p, q]`."""

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowrank import whole_core

        common = whole_core(deltas)
        return between(common.left, self.core(np.stack(common.cores), weights, at), common.right)


class PlugIn(Combiner):
    """Combiners that run another combiner, `then`, and transform its inputs or its result.

    `settings` are the parameters of the combiner `then`.

    Attributes:
        within: the paper's values for parameters of the combiner `then`. Values for parameters that `then` does not
            have are ignored. Values in `settings` take precedence.
    """

    plug: ClassVar[str | None] = "then"
    within: ClassVar[Mapping[str, Value]] = {}
    then: str = "task_arithmetic"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def inner(self) -> Combiner:
        from . import COMBINERS

        other = COMBINERS[self.then]
        accepted = {name: value for name, value in self.within.items() if name in other.parameters()}
        return combiner_of(other, {**accepted, **self.settings})

    @property
    def counts(self) -> bool:
        return self.inner.counts

    def values(self) -> dict[str, Value]:
        return super().values() | {"then": self.then} | self.inner.values()

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self.inner.vector(changes, weights, at)


def combiner_of(cls: type[Combiner], values: Mapping[str, object]) -> Combiner:
    """Check the parameter values, and return the combiner with these values.

    Raises:
        UsageError: a parameter is unknown; its value is not allowed; or the method `then` cannot be an inner method.
    """
    if not issubclass(cls, PlugIn):
        method = cls(**{name: cls.checked(name, value) for name, value in values.items()})
        method.check()
        return method
    accepted = {name: cls.checked(name, value) for name, value in values.items() if name in cls.parameters()}
    rest = {name: value for name, value in values.items() if name not in accepted and name != "then"}
    plugged: Any = cls(**accepted, settings=rest, then=cast(str, values.get("then", cls.then)))
    plugged.check()
    if isinstance(plugged.inner, PlugIn) or plugged.inner.data is not None or plugged.inner.based:
        raise UsageError(
            f"the method {plugged.then!r} cannot be the inner method of another method",
            where="then",
            cure="Set `then` to a method that needs neither data nor a base, and that has no parameter `then` itself",
        )
    return plugged  # type: ignore[no-any-return]


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _typed(value: object, kind: type) -> Value:
    # In Python, True is an integer, but `density=True` must not count as 1.
    if isinstance(value, bool) or kind in (bool, str):
        return cast("Value", value) if type(value) is kind else None
    if kind is int:
        return value if isinstance(value, int) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _default_text(field: dataclasses.Field[Value]) -> str:
    facts = field.metadata
    if facts["among"]:
        return f"One of: {', '.join(facts['among'])}"
    bounds = [f"from {facts['least']:g}"] * (facts["least"] > -math.inf) + [f"to {facts['most']:g}"] * (
        facts["most"] < math.inf
    )
    return f"{facts['meaning']}: {_KINDS[facts['kind']]} {' '.join(bounds)}".rstrip()


LOW_RANK = (
    "Convert the adapter to LoRA: adapterkit resize A --promote (ak.ops.promote); or choose another --method (method=)"
)

ONE_RANK = "Resize all adapters to one rank: adapterkit resize A --rank R; or choose another --method (method=)"


class Pairwise(Combiner):
    """A combiner whose formula gets the low-rank factors B and A of each change."""

    @abstractmethod
    def factors(self, Bs: list[Array], As: list[Array], at: FormulaContext) -> tuple[Array, Array]:
        """Combine the tasks' B and A; return B `[out, r]` and A `[r, in * k]` of the result.

        Each task's B has already been multiplied by the task's weight.
        """

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        checked_pairs(deltas, at, equal=False)
        Bs = [w * delta.B for delta, w in zip(deltas, weights, strict=True)]
        return Delta(*self.factors(Bs, [delta.A for delta in deltas], at))


def checked_pairs(deltas: Sequence[Delta], at: FormulaContext, *, equal: bool = True) -> None:
    """Check that all changes have low-rank factors and, if `equal` is set, that their ranks are equal.

    Raises:
        UsageError: a change has no low-rank factors, or the ranks differ.
    """
    if any(delta.rest is not None for delta in deltas):
        raise UsageError("a change has no low-rank factors", where=str(at.target), cure=LOW_RANK)
    ranks = [delta.rank for delta in deltas]
    if equal and len(set(ranks)) > 1:
        why = f"the ranks differ ({', '.join(map(str, ranks))}), so the factors B and A cannot be summed separately"
        raise UsageError(why, where=str(at.target), cure=ONE_RANK)
