"""Laws of weights at a base: what they add there, W' - W, as a dense difference that is worked out when it is read.

Kinds decide: additive updates need no base; other laws of weights can be added up at a given base only; laws of outputs
and contexts never.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, Target
from ..core.updates import Additive, Update
from ..errors import NotMergeable, UsageError
from ..io.checkpoint import opened
from ..io.computed import computed, load
from ..io.lazy import DTYPES
from ..methods.dense import Dense
from ..naming.binding import bind
from ..naming.binding.fitting import viewed
from ..naming.ties import aliases
from .lowering import loaded, part

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..io.lazy import Lazy, Shape
    from ..naming.binding import Site
    from .lowering import Base


def bound(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, tuple[Site, ...]]:
    """The adapter in the names and layouts of the base, and where each target lies; a tied head has its own name, too.

    Raises:
        TargetNotFound, ShapeMismatch: see `Adapter.bind`.
    """
    from ..formats._trained import sites_as_trained

    found = bind(adapter, base, aliases=aliases(base))
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return found.adapter, tuple(sites_as_trained(found.sites, adapter.recipe, shapes))


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
    _, sites = bound(adapter, checkpoint)
    return adapter.replace(updates={site.target: _at_base(site, checkpoint) for site in sites})


class Weights:
    """What a base has at targets that are bound to it, as formulas see it."""

    def __init__(self, targets: Mapping[Target, tuple[Update, ...]], base: Base) -> None:
        self.base = opened(base)
        self.sites = {site.target: site for site in bound(Adapter(targets), self.base)[1]}

    def at(self, target: Target, expert: int | None, bias: bool) -> Array:
        """A weight `[out, in * k]` or a bias `[out]`, float64; one of a stack.

        Raises:
            UsageError: the base has no bias there.
            Malformed: a NaN or an infinity.
        """
        site = self.sites[target]
        stored = site.bias if bias else site.weight
        if stored is None:
            raise UsageError("the base has no bias here", where=str(target), cure="Choose another method")
        W: Array = view_of(load(_tensor(self.base, stored)), target, bias)
        one = W if expert is None else W[expert]
        return one if bias else one.reshape(len(one), -1)


def check_kind(update: Update, target: Target, based: bool, doing: str) -> None:
    """Refuses what has no difference of weights, and without a base what has none but at one."""
    where = f"{target}: {update.method}"
    if update.kind not in ("additive", "weight"):
        why = f"{update.method} changes {update.acts_on}, not weights: it cannot be {doing}"
        raise NotMergeable(why, where=where, cure="Attach such adapters side by side in a live model")
    if update.kind == "weight" and not based:
        why = f"{update.method} is a law of the weight that it finds: what it adds there can be {doing} at a base only"
        raise UsageError(why, where=where, cure="Pass base=/--base")


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
            W = _tensor(base, stored)
            shape = _seen(W.shape, site.target, bias)
            wide = DTYPES["F64" if W.dtype.name == "F64" else "F32"]
            fields[name] = computed(shape, wide, _difference(site, lawful, base, stored, bias))
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

        W = view_of(load(_tensor(base, stored)), site.target, bias)
        ready = [loaded(update, site.target) for update in updates]
        if bias and any(update.bias_sees_weight for update in ready):
            ready = _settled(ready, site, base)
        ready = [update for update in ready if (update.changes_bias if bias else update.changes_weight)]
        weights = [(W, None)] if not site.target.stacked else [(one, e) for e, one in enumerate(W)]
        made = [_through(ready, one, e, bias) - one for one, e in weights]
        return np.stack(made) if site.target.stacked else made[0]

    return make


def _settled(updates: list[Any], site: Site, base: Checkpoint) -> list[Any]:
    """The updates with what their changes to the bias take from the weight, each after those before it, worked out."""
    import numpy as np

    assert site.weight is not None
    W, done = view_of(load(_tensor(base, site.weight)), site.target), []
    for update in updates:
        done.append(update.settled(W))
        if not update.changes_weight:
            continue
        if site.target.stacked:
            W = np.stack([update.expert(e).new_weight(one) for e, one in enumerate(W)])
        else:
            W = update.new_weight(W)
    return done


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


def _tensor(base: Checkpoint, name: str) -> Lazy:
    """A stored tensor by its name, or by the name of a head that is tied to it."""
    return base.tensors[aliases(base).get(name, name)]
