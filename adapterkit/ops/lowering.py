"""Convert updates to changes of weights, and computed changes to updates.

A change consists of low-rank factors if the update's method has such factors; otherwise, the change is a dense array.
All arithmetic on adapters uses these changes. Their factors and dense arrays are float64 numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.adapter import Adapter, Step, Target
from ..core.metadata import DROPOUT_LIST, METADATA, MODEL_TYPE, combined_dropouts, merged_metadata, model_types_of
from ..core.updates import Additive, Update
from ..errors import (
    PASS_BASE,
    USE_ITS_BASE_OR_DOWNLOAD,
    AdapterkitError,
    Malformed,
    NotMergeable,
    ShapeMismatch,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from ..formats._trained import sites_as_trained
from ..io.checkpoint import opened
from ..io.computed import computed, load, rounded_lazy
from ..io.lazy import DTYPES, Lazy, NotComputed, as_lazy, dtype_named
from ..linalg.namespace import summed
from ..methods.dense import Dense
from ..methods.lora import LoRA
from ..naming.binding import bind, view
from ..naming.binding.fitting import viewed
from ..naming.ties import aliases

if TYPE_CHECKING:
    from os import PathLike

    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..io.lazy import Buffer, DType, Leaf, Shape
    from ..io.strict_json import JsonValue
    from ..naming.binding import Site

    Base = Checkpoint | str | PathLike[str]

    Hold = Callable[[Array, DType], Lazy]


U = TypeVar("U", bound=Update)


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A change of one weight, `D = B @ A + rest`, in float64.

    Attributes:
        B: `[out, r]`. Each update with low-rank factors increases r by its rank, but by no more than min(out, in * k).
        A: `[r, in * k]`.
        rest: `[out, in * k]`, or None if D = B @ A.
    """

    B: Array
    A: Array
    rest: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.B), self.A.shape[1]

    @property
    def rank(self) -> int:
        """The inner size r of B @ A."""
        return len(self.A)

    def dense(self) -> Array:
        """Return D `[out, in * k]`. Callers must not modify D, because D may be the array `rest` itself."""
        # If r is 0, skip the product. It would only fill an array with zeros, which took 5% of the run time of
        # `knots_ties`.
        if self.rest is not None and not self.rank:
            return self.rest
        product: Array = self.B @ self.A
        return product if self.rest is None else product + self.rest

    def scaled(self, weight: float) -> Delta:
        return Delta(weight * self.B, self.A, None if self.rest is None else weight * self.rest)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The change that one adapter makes to one target: the sum of additive updates, multiplied by `weight`.

    Each call of `deltas` or `bias` reads the tensors again.

    Attributes:
        target: the target.
        shape: the shape of one weight, `[out, in, *k]`.
        updates: the terms of the sum.
        weight: the factor by which the sum is multiplied.
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
        """The number of stacked experts; None if the target is not stacked."""
        return int(self.updates[0].dims(True)["e"]) if self.target.stacked else None  # type: ignore[arg-type]

    def deltas(self) -> Iterator[Delta]:
        """Yield the change of the weight; for stacked experts, yield one change per expert, in order.

        Raises:
            Malformed: a tensor contains a NaN or an infinity.
        """
        # Read each tensor only once, before the loop: a tensor of stacked experts contains the values of all experts.
        changing = [loaded(update, self.target) for update in self.updates if update.changes_weight]
        for expert in (None,) if self.experts is None else range(self.experts):
            yield _sum([_delta(part(update, expert), self.shape, self.weight) for update in changing])

    def bias(self) -> Array | None:
        """Return the change of the bias, `[out]` or `[e, out]`; None if the bias does not change."""
        changing = [loaded(update, self.target) for update in self.updates if update.changes_bias]
        terms = [self.weight * self._bias_of(update) for update in changing]
        return summed(terms) if terms else None

    def _bias_of(self, update: Additive) -> Array:
        """Return one update's change of the bias.

        For stacked experts, the formula runs once per expert, because a formula accepts only a single weight.
        """
        import numpy as np

        if self.experts is None:
            change: Any = update.bias_delta()
            return np.asarray(change)
        return np.stack([np.asarray(part(update, expert).bias_delta()) for expert in range(self.experts)])


def loaded(update: U, target: Target) -> U:
    """Return an update with its tensors as float64 numpy arrays.

    Raises:
        Malformed: a tensor contains a NaN or an infinity; the message names target, method and field.
    """
    tensors = {}
    for name, leaf in update.tensors.items():
        try:
            tensors[name] = load(leaf)
        except AdapterkitError as error:
            raise error.at(where=f"{target}: {update.method}.{name}") from None
    return update.replace(**tensors)


def part(update: U, expert: int | None) -> U:
    """Return one expert's update; the update itself if `expert` is None."""
    return update if expert is None else update.expert(expert)


def _delta(update: Additive, shape: Shape, weight: float) -> Delta:
    try:
        return _formed(update, shape, weight)
    except IndexError as error:  # No earlier code checks the indices that the file contains.
        raise Malformed(
            f"{update.method}: an index is outside the weight ({error})", cure=USE_ITS_BASE_OR_DOWNLOAD
        ) from None
    except ValueError as error:  # The update does not record the shape of its weight. No earlier code checks the shape.
        why = f"{update.method}: the update does not fit a weight of shape {list(shape)} ({error})"
        raise ShapeMismatch(why, cure=USE_ITS_BASE_OR_DOWNLOAD) from None


def _formed(update: Additive, shape: Shape, weight: float) -> Delta:
    import numpy as np

    out, columns = shape[0], math.prod(shape[1:])
    pair = update.pair(shape)
    if pair is not None:
        B, A = (np.asarray(factor) for factor in pair)
        # If the rank exceeds the smaller side of the matrix, B and A take more space than their product. Replace them
        # by the product and an identity matrix.
        if len(A) > min(out, columns):
            D, identity = B @ A, np.eye(min(out, columns))
            B, A = (D, identity) if columns < out else (identity, D)
        return Delta(weight * B, A)
    dense = np.empty(shape)
    update.delta_into(dense, weight)  # type: ignore[arg-type]
    return Delta(np.zeros((out, 0)), np.zeros((0, columns)), dense.reshape(out, columns))


def _sum(deltas: list[Delta]) -> Delta:
    import numpy as np

    if len(deltas) == 1:
        return deltas[0]
    rests = [delta.rest for delta in deltas if delta.rest is not None]
    B, A = np.hstack([delta.B for delta in deltas]), np.vstack([delta.A for delta in deltas])
    return Delta(B, A, summed(rests) if rests else None)


# Convert updates whose formulas depend on the base's weight W to the difference W' - W, where W' is the new weight.
#
# The difference is a dense update, which is computed when it is read. Additive updates can be summed without a base;
# other updates of weights must be converted first. Updates of outputs or contexts cannot be summed.


def bound(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, tuple[Site, ...]]:
    """Return the adapter with the base's names and layouts, and one `Site` per target.

    A `Site` contains the names of the base's tensors that belong to the target.

    Raises:
        TargetNotFound, ShapeMismatch: see `Adapter.bind`.
    """
    bound_ = bind(adapter, base, aliases=aliases(base))
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return bound_.adapter, tuple(sites_as_trained(bound_.sites, adapter.recipe, shapes))


def additive(adapter: Adapter, base: Base | None, doing: str) -> Adapter:
    """Return the adapter with only additive updates; other updates become differences from the base's weights.

    Args:
        adapter: the adapter. If a base is given, the adapter must already be bound to it.
        base: the base, which contains the weight W. It may be None if all updates are additive.
        doing: a participle that names the operation in error messages, such as `"added"`.

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
    """Read the base's weights and biases for an adapter's targets, in the layout that the methods' formulas expect."""

    def __init__(self, targets: Mapping[Target, tuple[Update, ...]], base: Base) -> None:
        self.base = opened(base)
        self.sites = {site.target: site for site in bound(Adapter(targets), self.base)[1]}

    def at(self, target: Target, expert: int | None, bias: bool) -> Array:
        """Return the target's weight `[out, in * k]`, or its bias `[out]` if `bias` is set, in float64.

        For stacked experts, return the weight or bias of the expert with index `expert`.

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
    """Check that an update changes weights. If `based` is false, also check that it does not use the base's weight."""
    where = f"{target}: {update.method}"
    if update.kind not in ("additive", "weight"):
        why = f"{update.method} changes {update.acts_on}, not weights, so it cannot be {doing}"
        raise NotMergeable(why, where=where, cure="Inject such adapters side by side into a live model")
    if update.kind == "weight" and not based:
        why = f"the change of {update.method} depends on the base's weight, so it cannot be {doing} without a base"
        raise UsageError(why, where=where, cure=PASS_BASE)


def _at_base(site: Site, base: Checkpoint) -> tuple[Update, ...]:
    """Merge all updates up to the last non-additive update into a single dense update.

    The dense update is computed when it is read.
    """
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
            # float32 is precise enough for differences of 16-bit and 32-bit weights. Only a float64 base needs float64.
            wide = DTYPES["F64" if W.dtype.name == "F64" else "F32"]
            fields[name] = computed(shape, wide, _difference(site, needing, base, stored, bias))
    return (Dense(**fields), *rest)  # type: ignore[arg-type]


def _seen(shape: Shape, target: Target, bias: bool) -> Shape:
    """Return the shape of the array that `view` would return for a stored tensor of shape `shape`."""
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
        differences = [_through(ready, one, e, bias) - one for one, e in weights]
        return np.stack(differences) if site.target.stacked else differences[0]

    return make


def _settled(updates: list[Update], site: Site, base: Checkpoint) -> list[Update]:
    """Compute the bias changes that depend on the weight, and return the updates with the computed values.

    The input of each update's formula is the base's weight after all earlier updates.
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
    """Return a tensor of the base. If `name` is a tied head, return the tensor to which the head is tied."""
    return base.tensors[aliases(base).get(name, name)]


# Build updates from computed arrays. Build adapters that record the lineages of the adapters they were computed from.


def low_rank(
    target: Target, shape: Shape, pairs: Sequence[tuple[Array, Array]], bias: Array | None, dtype: DType,
    hold: Hold = rounded_lazy,
) -> LoRA:  # fmt: skip
    """Build a LoRA from B `[out, r]` and A `[r, in * k]`.

    For stacked experts, all pairs are padded with zeros to the largest rank, and then stacked.

    Args:
        target: the target of the LoRA.
        shape: the shape of one weight, `[out, in, *k]`.
        pairs: a single pair (B, A); for stacked experts, one pair per expert.
        bias: the change of the bias, `[out]` or `[e, out]`; None if the bias does not change.
        dtype: the dtype of the LoRA's tensors.
        hold: a function that converts a computed array to a `Lazy` tensor of a given dtype.
    """
    import numpy as np

    # Use at least rank 1, because PEFT and file formats have no LoRA of rank 0.
    rank = max(1, *(len(A) for _, A in pairs))
    B = np.stack([_filled(B, rank, 1) for B, _ in pairs])
    A = np.stack([_filled(A, rank, 0).reshape(rank, *shape[1:]) for _, A in pairs])
    if not target.stacked:
        A, B = A[0], B[0]
    return LoRA(A=hold(A, dtype), B=hold(B, dtype), bias=None if bias is None else hold(bias, dtype))  # type: ignore[arg-type]


def dense(
    target: Target,
    shape: Shape,
    changes: Sequence[Array] | None,
    bias: Array | None,
    dtype: DType,
    hold: Hold = rounded_lazy,
) -> Dense:
    """Build a dense update from the changes of a weight and its bias.

    Args:
        target: the target of the update.
        shape: the shape of one weight, `[out, in, *k]`.
        changes: a single change `[out, in * k]`; for stacked experts, one per expert. None if the weight does not
            change.
        bias: the change of the bias, `[out]` or `[e, out]`; None if the bias does not change.
        dtype: the dtype of the update's tensors.
        hold: a function that converts a computed array to a `Lazy` tensor of a given dtype.
    """
    import numpy as np

    D = None if changes is None else np.stack([change.reshape(shape) for change in changes])
    if D is not None and not target.stacked:
        D = D[0]
    return Dense(**{name: hold(v, dtype) for name, v in (("D", D), ("d", bias)) if v is not None})  # type: ignore[arg-type]


def balanced(U: Array, S: Array, Vh: Array) -> tuple[Array, Array]:
    """Return `B = U sqrt(S)` and `A = sqrt(S) Vh`."""
    root = S**0.5
    return U * root, root[:, None] * Vh


def result_type(adapters: Sequence[Adapter], dtype: str | None) -> DType:
    """Return the dtype of computed results: `dtype` if given, else float64 if any tensor is float64, else float32.

    Raises:
        Unsupported: `dtype` is not the name of a floating type.
    """
    from ..io.lazy import dtype_of

    if dtype is None:
        names = {dtype_of(leaf).name for a in adapters for _, update in a for leaf in update.tensors.values()}
        return DTYPES["F64" if "F64" in names else "F32"]
    kind = dtype_named(dtype)
    if kind is None or not kind.floating or kind.name == "C64":
        known = ", ".join(name for name, d in DTYPES.items() if d.floating and name != "C64")
        raise Unsupported(f"factors cannot have the dtype {dtype!r}", cure=f"Choose among {known}")
    return kind


def of_several(
    adapters: Sequence[Adapter], updates: Mapping[Target, tuple[Update, ...]], op: str, **args: JsonValue
) -> Adapter:
    """Return an adapter with these updates. Its lineage is one step, `op`, which contains the lineages of `adapters`.

    The new adapter records a base only if all `adapters` record the same base.
    """
    bases = [adapter.base for adapter in adapters]
    base = bases[0] if all(other == bases[0] for other in bases) else None
    of: list[JsonValue] = [
        {
            "base": None if adapter.base is None else adapter.base.id,
            "recipe": [{"op": step.op, "args": dict(step.args)} for step in adapter.recipe],
        }
        for adapter in adapters
    ]
    carried = merged_metadata(adapters)
    if carried:
        args |= {METADATA: carried}
    families = {family for adapter in adapters for family in model_types_of(adapter)}
    # Record a model type only if the adapters' model types are the same. An adapter can record only one model type.
    if len(families) == 1:
        args |= {MODEL_TYPE: families.pop()}
    dropouts: list[Any] = [*combined_dropouts(adapters)]
    if any(dropouts):
        args |= {DROPOUT_LIST: dropouts}
    return Adapter(updates, base, (Step(op, {**args, "of": of}),))


def _filled(array: Array, rank: int, axis: int) -> Array:
    import numpy as np

    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


# Describe a combination's result before it is computed, so that a format can refuse the result early.


def unread(leaf: Leaf) -> Lazy:
    """Return a placeholder with the tensor's shape and dtype. Reading the placeholder raises `NotComputed`."""
    known = as_lazy(leaf)
    return unknown(known.shape, known.dtype)


def unknown(shape: Sequence[int], dtype: DType) -> Lazy:
    """Return a placeholder for a tensor that is not computed yet. Reading the placeholder raises `NotComputed`."""

    def fetch() -> Buffer:
        raise NotComputed

    return Lazy(tuple(shape), dtype, fetch)


def blank(updates: Mapping[Target, tuple[Update, ...]]) -> dict[Target, tuple[Update, ...]]:
    """Replace all tensors of the updates with placeholders that cannot be read."""
    return {target: tuple(update.map(unread) for update in group) for target, group in updates.items()}


def check_writable(outline: Adapter, write: Callable[[Adapter], object], what: str) -> None:
    """Check that a format can store a result, before the result is computed.

    Args:
        outline: the result, in which `blank` has replaced all tensors with placeholders.
        write: a function that writes an adapter to a temporary folder. It must check all updates before it reads any
            tensor.
        what: the start of the error message, which names the format and the method.

    Raises:
        Unrepresentable: the format cannot store some updates; the message names the first.
    """
    try:
        write(outline)
    # Reading a tensor raises `NotComputed`. The writer has checked all updates by then, so the format can store them.
    except NotComputed:
        return
    except Unrepresentable as error:
        first = f": {error.items[0]}" if error.items else f": {error.why}"
        more = f" (and {len(error.items) - 1} more)" if len(error.items) > 1 else ""
        cure = "Pass --to adapterkit (format='adapterkit'), or drop these updates with --on-loss drop (on_loss='drop')"
        raise Unrepresentable(f"{what}{first}{more}", cure=cure) from None
    except AdapterkitError as error:
        error.path = None
        raise
