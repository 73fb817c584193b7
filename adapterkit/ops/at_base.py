"""Convert an update whose formula depends on the weight into its difference W' - W at a given base.

The difference is a dense update, which is computed when it is read. Additive updates can be summed without a base,
other updates of weights only after this conversion. Updates of outputs or contexts cannot be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, Target
from ..core.updates import Additive, Update
from ..errors import NotMergeable, UsageError
from ..formats._trained import sites_as_trained
from ..io.checkpoint import opened
from ..io.computed import computed, load
from ..io.lazy import DTYPES
from ..methods.dense import Dense
from ..naming.binding import bind, view
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
    """Bind an adapter to the base; return it in the base's names and layouts, with the site of each target.

    Raises:
        TargetNotFound, ShapeMismatch: see `Adapter.bind`.
    """
    found = bind(adapter, base, aliases=aliases(base))
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return found.adapter, tuple(sites_as_trained(found.sites, adapter.recipe, shapes))


def additive(adapter: Adapter, base: Base | None, doing: str) -> Adapter:
    """Return the adapter with only additive updates; replace every other update by its difference at the base.

    Args:
        adapter: the adapter, bound to the base if there is one.
        base: the base with the weight W.
        doing: a participle for messages, such as `"added"`.

    Raises:
        NotMergeable: a method does not change weights.
        UsageError: a method's formula depends on W, but no base was given.
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
    """Read the weights and biases of a base at an adapter's targets, with the axes that formulas expect."""

    def __init__(self, targets: Mapping[Target, tuple[Update, ...]], base: Base) -> None:
        self.base = opened(base)
        self.sites = {site.target: site for site in bound(Adapter(targets), self.base)[1]}

    def at(self, target: Target, expert: int | None, bias: bool) -> Array:
        """Return a weight `[out, in * k]` or a bias `[out]` in float64; of a stack, return the slice of `expert`.

        Raises:
            UsageError: the base has no bias at this target.
            Malformed: the tensor contains a NaN or an infinity.
        """
        site = self.sites[target]
        stored = site.bias if bias else site.weight
        if stored is None:
            raise UsageError("the base has no bias for this target", where=str(target), cure="Choose another method")
        W: Array = view(load(_tensor(self.base, stored)), target, bias)
        one = W if expert is None else W[expert]
        return one if bias else one.reshape(len(one), -1)


def check_kind(update: Update, target: Target, based: bool, doing: str) -> None:
    """Check that an update changes weights and, without a base, that its formula does not depend on the weight."""
    where = f"{target}: {update.method}"
    if update.kind not in ("additive", "weight"):
        why = f"{update.method} changes {update.acts_on}, not weights, so it cannot be {doing}"
        raise NotMergeable(why, where=where, cure="Attach such adapters side by side in a live model")
    if update.kind == "weight" and not based:
        why = f"the change of {update.method} depends on the base's weight, so it can only be {doing} at a base"
        raise UsageError(why, where=where, cure="Pass base=/--base")


def _at_base(site: Site, base: Checkpoint) -> tuple[Update, ...]:
    """Replace all updates up to the last non-additive update by one dense difference, computed when it is read."""
    last = max((i + 1 for i, update in enumerate(site.updates) if not isinstance(update, Additive)), default=0)
    needing, rest = site.updates[:last], site.updates[last:]
    if not needing:
        return rest
    fields = {}
    for name, stored, bias in (("D", site.weight, False), ("d", site.bias, True)):
        changing = tuple(u for u in needing if (u.changes_bias if bias else u.changes_weight))
        if stored is not None and changing:
            W = _tensor(base, stored)
            shape = _seen(W.shape, site.target, bias)
            # float32 is precise enough for differences of 16-bit and 32-bit weights; for a base in float64, use
            # float64.
            wide = DTYPES["F64" if W.dtype.name == "F64" else "F32"]
            fields[name] = computed(shape, wide, _difference(site, needing, base, stored, bias))
    return (Dense(**fields), *rest)  # type: ignore[arg-type]


def _seen(shape: Shape, target: Target, bias: bool) -> Shape:
    """Return a stored tensor's shape with the axes of `view`."""
    axis = len(shape) - 1 if bias else int(target.stacked)
    seen = shape if bias else viewed(shape, target)
    assert seen is not None
    rows = target.rows
    return seen if rows is None else (*seen[:axis], rows[1] - rows[0], *seen[axis + 1 :])


def _difference(
    site: Site, updates: tuple[Update, ...], base: Checkpoint, stored: str, bias: bool
) -> Callable[[], Array]:
    def make() -> Array:
        import numpy as np

        W = view(load(_tensor(base, stored)), site.target, bias)
        ready = [loaded(update, site.target) for update in updates]
        if bias and any(update.bias_sees_weight for update in ready):
            ready = _settled(ready, site, base)
        ready = [update for update in ready if (update.changes_bias if bias else update.changes_weight)]
        weights = [(W, None)] if not site.target.stacked else [(one, e) for e, one in enumerate(W)]
        made = [_through(ready, one, e, bias) - one for one, e in weights]
        return np.stack(made) if site.target.stacked else made[0]

    return make


def _settled(updates: list[Update], site: Site, base: Checkpoint) -> list[Update]:
    """Resolve updates whose change of the bias depends on the weight.

    Each update gets the weight after the earlier updates.
    """
    import numpy as np

    assert site.weight is not None
    # Formulas are typed for torch tensors, but also run on numpy arrays.
    W: Any = view(load(_tensor(base, site.weight)), site.target)
    done = []
    for update in updates:
        done.append(update.settled_at(W, site.target.stacked))
        if not update.changes_weight:
            continue
        if site.target.stacked:
            W = np.stack([update.expert(e).new_weight(one) for e, one in enumerate(W)])
        else:
            W = update.new_weight(W)
    return done


def _through(updates: list[Update], W: Any, expert: int | None, bias: bool) -> Any:
    for update in updates:
        W = part(update, expert).new_bias(W) if bias else part(update, expert).new_weight(W)
    return W


def _tensor(base: Checkpoint, name: str) -> Lazy:
    """Return a stored tensor; `name` may also be the name of a tied head."""
    return base.tensors[aliases(base).get(name, name)]
