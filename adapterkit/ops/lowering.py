"""Lowering: what an adapter adds to each weight, as a pair of thin factors wherever there is one, else whole.

Kinds decide: additive updates say it themselves; other laws of weights only at a given base, as W' - W there; laws of
outputs and contexts never. All arithmetic on adapters runs on what this gives, in float64 numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..binding import bind, view_shape
from ..binding.layouts import viewed
from ..errors import AdapterkitError, NotMergeable, UsageError
from ..methods.dense import Dense
from ..tensors.checkpoint import opened
from ..tensors.computed import computed, load
from ..tensors.dtypes import DTYPES
from ..updates import Additive, Update

if TYPE_CHECKING:
    from os import PathLike

    from ..adapter import Adapter, Target
    from ..binding import Site
    from ..tensors.checkpoint import Checkpoint
    from ..tensors.computed import Array
    from ..tensors.lazy import Shape

    Base = Checkpoint | str | PathLike[str]


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A change of one weight: D = B @ A + rest, all float64.

    Attributes:
        B: `[out, r]`; r is 0 where there is no low-rank part.
        A: `[r, in * k]`.
        rest: `[out, in * k]`, or None where B @ A is all.
    """

    B: Array
    A: Array
    rest: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.B), self.A.shape[1]

    @property
    def rank(self) -> int:
        """The inner size of B @ A; nothing is said of the rest."""
        return len(self.A)

    def dense(self) -> Array:
        """D `[out, in * k]`."""
        product: Array = self.B @ self.A
        return product if self.rest is None else product + self.rest

    def scaled(self, weight: float) -> Delta:
        return Delta(weight * self.B, self.A, None if self.rest is None else weight * self.rest)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What one adapter adds at one target: the sum of its additive updates, times a weight. Nothing is read yet.

    Attributes:
        target: where.
        shape: of one weight, `[out, in, *k]`.
        updates: the terms of the sum.
        weight: how much of it is meant.
    """

    target: Target
    shape: Shape
    updates: tuple[Additive, ...]
    weight: float = 1.0

    @property
    def changes_weight(self) -> bool:
        return any(update.changes_weight for update in self.updates)

    @property
    def changes_bias(self) -> bool:
        return any(update.changes_bias for update in self.updates)

    @property
    def experts(self) -> int | None:
        """How many weights are stacked here; None for one alone."""
        return int(self.updates[0].dims(True)["e"]) if self.target.stacked else None  # type: ignore[arg-type]

    def deltas(self) -> Iterator[Delta]:
        """The change of the weight, or of each expert's, in order, one at a time.

        Raises:
            Malformed: a NaN or an infinity.
        """
        changing = [loaded(update, self.target) for update in self.updates if update.changes_weight]
        for expert in (None,) if self.experts is None else range(self.experts):
            yield _sum([_delta(part(update, expert), self.shape, self.weight) for update in changing])

    def bias(self) -> Array | None:
        """The change of the bias, `[out]` or `[e, out]`; None where it stays as it is."""
        changing = [loaded(update, self.target) for update in self.updates if update.changes_bias]
        terms: list[Any] = [self.weight * update.bias_delta() for update in changing]
        return sum(terms) if terms else None


def loaded(update: Any, target: Target) -> Any:
    """An update over numpy arrays, float64.

    Raises:
        Malformed: a NaN or an infinity; names target, method and field.
    """
    tensors = {}
    for name, leaf in update.tensors.items():
        try:
            tensors[name] = load(leaf)
        except AdapterkitError as error:
            raise error.at(where=f"{target}: {update.method}.{name}") from None
    return update.replace(**tensors)


def part(update: Any, expert: int | None) -> Any:
    """One expert's update, where experts are stacked."""
    return update if expert is None else update.expert(expert)


def additive(adapter: Adapter, base: Base | None, doing: str) -> Adapter:
    """The adapter with additive updates only: other laws of weights become their difference at the base.

    Args:
        adapter: bound to the base, if there is one.
        base: where W comes from.
        doing: what is done with it, for messages: `"added"`.

    Raises:
        NotMergeable: a law is not one of weights.
        UsageError: a law needs W and there is no base.
    """
    if all(isinstance(update, Additive) for _, update in adapter):
        return adapter
    for target, update in adapter:
        check_kind(update, target, base is not None, doing)
    assert base is not None
    checkpoint = opened(base)
    sites = bind(adapter, checkpoint).sites
    return adapter.replace(updates={site.target: _at_base(site, checkpoint) for site in sites})


def check_kind(update: Update, target: Target, based: bool, doing: str) -> None:
    """Refuses what has no difference of weights, and without a base what has none but at one."""
    where = f"{target}: {update.method}"
    if update.kind not in ("additive", "weight"):
        why = f"{update.method} changes {update.acts_on}, not weights: it cannot be {doing}"
        raise NotMergeable(why, where=where, cure="Attach such adapters side by side in a live model")
    if update.kind == "weight" and not based:
        why = f"{update.method} is a law of the weight that it finds: what it adds there can be {doing} at a base only"
        raise UsageError(why, where=where, cure="Pass base=/--base")


def shape_of(target: Target, updates: Sequence[Update], base: Base | None) -> Shape | None:
    """The shape of one weight there, `[out, in, *k]`; `[out]` if only a bias is changed; None if nothing tells it."""
    if base is not None:
        tensors = opened(base).tensors
        stored = tensors.get(f"{target.path}.weight") or tensors.get(target.path)
        seen = None if stored is None else viewed(stored.shape, target)
        if seen is not None:
            rows = target.rows
            shape = seen[int(target.stacked) :]
            return shape if rows is None else (rows[1] - rows[0], *shape[1:])
    if not any(update.changes_weight for update in updates):
        return (int(updates[0].dims(target.stacked)["out"]),)  # type: ignore[arg-type]
    try:
        return view_shape(target, [update for update in updates if update.changes_weight])[int(target.stacked) :]
    except UsageError:
        return None


def _delta(update: Additive, shape: Shape, weight: float) -> Delta:
    import numpy as np

    out, columns = shape[0], math.prod(shape[1:])
    pair = update.pair(shape)
    if pair is not None and len(pair[1]) <= min(out, columns):
        return Delta(weight * np.asarray(pair[0]), np.asarray(pair[1]))
    dense = np.empty(shape)
    update.delta_into(dense, weight)  # type: ignore[arg-type]
    return Delta(np.zeros((out, 0)), np.zeros((0, columns)), dense.reshape(out, columns))


def _sum(deltas: list[Delta]) -> Delta:
    import numpy as np

    if len(deltas) == 1:
        return deltas[0]
    rests = [delta.rest for delta in deltas if delta.rest is not None]
    B, A = np.hstack([delta.B for delta in deltas]), np.vstack([delta.A for delta in deltas])
    return Delta(B, A, sum(rests) if rests else None)  # type: ignore[arg-type]


def _at_base(site: Site, base: Checkpoint) -> tuple[Update, ...]:
    """The updates of a site with those up to the last that needs W as a difference, worked out when it is read."""
    last = max((i + 1 for i, update in enumerate(site.updates) if not isinstance(update, Additive)), default=0)
    lawful, rest = site.updates[:last], site.updates[last:]
    if not lawful:
        return rest
    fields = {}
    for name, stored, bias in (("D", site.weight, False), ("d", site.bias, True)):
        changing = tuple(u for u in lawful if (u.changes_bias if bias else u.changes_weight))
        if stored is not None and changing:
            W = base.tensors[stored]
            shape = _seen(W.shape, site.target, bias)
            wide = DTYPES["F64" if W.dtype.name == "F64" else "F32"]
            fields[name] = computed(shape, wide, _difference(site, changing, base, stored, bias))
    return (Dense(**fields), *rest)  # type: ignore[arg-type]


def _seen(shape: Shape, target: Target, bias: bool) -> Shape:
    """The shape of a stored tensor in the target's view, stack included."""
    axis = len(shape) - 1 if bias else int(target.stacked)
    seen = shape if bias else viewed(shape, target)
    assert seen is not None
    rows = target.rows
    return seen if rows is None else (*seen[:axis], rows[1] - rows[0], *seen[axis + 1 :])


def _difference(site: Site, updates: tuple[Update, ...], base: Checkpoint, stored: str, bias: bool) -> Any:
    def make() -> Array:
        import numpy as np

        W = view_of(load(base.tensors[stored]), site.target, bias)
        ready = [loaded(update, site.target) for update in updates]
        weights = [(W, None)] if not site.target.stacked else [(one, e) for e, one in enumerate(W)]
        made = [_through(ready, one, e, bias) - one for one, e in weights]
        return np.stack(made) if site.target.stacked else made[0]

    return make


def _through(updates: list[Any], W: Any, expert: int | None, bias: bool) -> Any:
    for update in updates:
        W = part(update, expert).new_bias(W) if bias else part(update, expert).new_weight(W)
    return W


def view_of(W: Any, target: Target, bias: bool = False) -> Any:
    """A stored tensor, of numpy or torch, as the target's updates see it; no copy."""
    if bias:
        return W if target.rows is None else W[..., slice(*target.rows)]
    if target.layout == "in out *k":
        W = W.swapaxes(0, 1)
    elif target.layout == "e in out *k":
        W = W.swapaxes(1, 2)
    if target.rows is None:
        return W
    rows = slice(*target.rows)
    return W[:, rows] if target.stacked else W[rows]
