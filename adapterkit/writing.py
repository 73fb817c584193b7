"""Write an adapter in any format; on request, rewrite updates in a method that the format supports.

A writer first checks all updates. If the format cannot express some of them, the writer raises `Unrepresentable`, which
lists them in `places`, and writes nothing. Promotion rewrites these updates and calls the writer again. Low-rank
changes become a LoRA with exactly their factors, without a decomposition. Other changes become a weight difference
(`Dense`) if the format supports weight differences, or the nearest LoRA if the caller accepts an error. Promotion needs
the package `ops`, which the writers in `formats` may not import; therefore promotion is in this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from .core.adapter import Adapter, check_adapter
from .core.updates import Additive
from .errors import AdapterkitError, Miswritten, NotMergeable, Unrepresentable, UsageError
from .formats import FORMATS, save
from .formats._functions import unlike
from .io.checkpoint import opened
from .io.computed import computed, load, rounded_lazy
from .io.lazy import as_lazy
from .methods.dense import Dense
from .methods.lora import LoRA
from .methods.replacement import Replacement
from .naming.binding import bind, view_shape, weight_shape

if TYPE_CHECKING:
    from .core.adapter import Target
    from .core.updates import Update
    from .formats import Format
    from .io.checkpoint import Checkpoint
    from .io.computed import Array
    from .io.lazy import DType, Lazy, Shape
    from .ops.lowering import Delta

ACCEPT = "Accept an error with max_error=/--max-error, pass the base if a formula needs it, or write another format"

_REPORT = "Nothing was written. Report this bug, or write adapterkit's own format"
_SLACK = 1e-4
"""The relative tolerance when the reported error of a promotion is checked. The absolute tolerance, for rounding to
float32, is a hundredth of this number."""

Written = list[str]
Ask = Callable[["Adapter"], Written]
Promoted = tuple["Target", "Update", str]
"""The promotion of one target: the target, the update that replaces all its updates, and a line for the user."""


def write(
    adapter: Adapter,
    path: str | PathLike[str],
    format: str = "adapterkit",  # noqa: A002 - the public contract's word
    base: Checkpoint | str | PathLike[str] | None = None,
    on_loss: str = "refuse",
    *,
    profile: str | None = None,
    max_error: float | None = None,
    overwrite: bool = True,
    made_from: str | None = None,
) -> list[str]:
    """Validate and write an adapter; return one line for each omitted or rewritten update. See `Format.write`.

    In every format, the output is staged next to `path` and renamed into place when it is complete: after an error,
    `path` is unchanged. If `path` is a folder with an adapter, the files that the format owns are replaced, and all
    others stay.

    Before the rename, the output is read back and compared with the adapter; a difference raises `Miswritten`.

    Args:
        adapter: the adapter to write.
        path: the file or folder to write.
        format: the format to write.
        base: the base, for formats that need it to resolve names or to order rows.
        on_loss: what to do with updates that the format cannot express; see `Format.write`.
        profile: the program that will load the output, if it supports only a part of the format, such as `"vllm"`.
            Scalings and ranks that the program ignores are folded into the tensors; updates that the program cannot
            run are refused.
        max_error: with `on_loss="promote"`, the largest relative Frobenius error of a change that the format can only
            approximate by a low rank; None allows no error.
        overwrite: replace an existing file or folder at `path`; if False, an existing file or folder is an error.
        made_from: a digest of all inputs and options. The digest is stored with the output, so that a later run with
            the same digest can skip the work; see `adapterkit.io.staging`.

    Raises:
        StorageError: `path` exists and `overwrite` is False, `path` is neither a file nor a folder, another process is
            writing it, or the disk is full.
        Miswritten: the written files differ from the adapter; the error names target and field.
        UsageError: the format needs the base to read the files back, but no base was given.
        AdapterkitError: see `Format.write`.
    """
    check_adapter(adapter)
    if max_error is not None and (on_loss != "promote" or not 0 < max_error < 1):
        raise UsageError(
            f"max_error is {max_error}", cure="Pass a number between 0 and 1, with on_loss='promote'/--on-loss promote"
        )
    below = None if base is None else opened(base)

    def once(adapter: Adapter) -> list[str]:
        return save(adapter, path, format, below, on_loss, profile=profile, overwrite=overwrite, made_from=made_from)

    promotion = Promotion.into(FORMATS[format](), max_error, below)
    if on_loss == "promote":
        return promotion.ask(adapter, once)
    try:
        return once(adapter)
    except Unrepresentable as refusal:
        promotion.suggest(adapter, refusal)
        raise


@dataclass(frozen=True, slots=True, eq=False)
class Promotion:
    """Rewrite the updates that a format refuses, in the methods that the format supports.

    Attributes:
        lora: whether the format supports LoRA.
        dense: whether the format supports weight differences (`Dense`).
        identities: whether a weight difference may become a LoRA of full rank, one factor of which is the identity.
        whole: whether the format supports whole parameters, so that the base's weight plus a difference may be written.
        max_error: the accepted relative Frobenius error of each change; None accepts no error.
        base: the base, for formulas that read its weights.
    """

    lora: bool
    dense: bool
    identities: bool
    whole: bool
    max_error: float | None
    base: Checkpoint | None

    @classmethod
    def into(cls, writer: Format, max_error: float | None, base: Checkpoint | None) -> Promotion:
        lora, whole = "lora" in writer.methods, writer.identities and "replacement" in writer.methods
        return cls(lora, writer.differences, writer.identities, whole, max_error, base)

    def ask(self, adapter: Adapter, write: Ask) -> Written:
        """Write the adapter; promote the updates that the writer refuses, and retry until the writer accepts all.

        Returns:
            The writer's lines, and a line for each promoted update.

        Raises:
            Unrepresentable: the writer refuses updates that cannot be promoted.
        """
        lines: list[str] = []
        while True:
            try:
                return lines + write(adapter)
            except Unrepresentable as refusal:
                refused = {target for target, _ in refusal.places}
                changed, promotion_lines = self._promoted(adapter, refused)
                if not promotion_lines:
                    # Try to promote all targets: the writer may refuse a LoRA because it conflicts with the others.
                    changed, promotion_lines = self._promoted(adapter, {*adapter.updates} if refused else set())
                if not promotion_lines:
                    if any(not _is_vector(adapter.updates.get(target, ())) for target in refused):
                        refusal.cure = ACCEPT
                    raise
                adapter, lines = changed, lines + promotion_lines

    def suggest(self, adapter: Adapter, refusal: Unrepresentable) -> None:
        """If promotion can write all refused updates without loss, put promotion first in the error's cure."""
        refused = {target for target, _ in refusal.places}
        groups = [adapter.updates.get(target, ()) for target in refused]
        if groups and all(self._is_exact(each) for each in groups):
            promote = "Write them in another method without loss, with on_loss='promote'/--on-loss promote"
            refusal.cure = f"{promote}. Or: {refusal.cure}" if refusal.cure else promote

    def _is_exact(self, group: Sequence[Update]) -> bool:
        """Whether the updates of a target can be rewritten, without loss, as one LoRA or one weight difference.

        False if the updates are already in this form.
        """
        if not group or (len(group) == 1 and isinstance(group[0], LoRA)):
            return False
        if len(group) == 1 and isinstance(group[0], Dense):
            return self.identities and _is_matrix(group[0])
        sums = [update for update in group if isinstance(update, Additive)]
        thin = self.lora and all(type(update).pair is not Additive.pair for update in sums)
        return len(sums) == len(group) and (self.dense or thin)

    def _promoted(self, adapter: Adapter, targets: set[Target]) -> tuple[Adapter, list[str]]:
        updates: dict[Target, tuple[Update, ...]] = {}
        lines: list[str] = []
        for target, group in adapter.updates.items():
            promoted = self._one(adapter, target) if target in targets else None
            updates |= {target: group} if promoted is None else {promoted[0]: (promoted[1],)}
            lines += [] if promoted is None else [promoted[2]]
        return (adapter.replace(updates=updates) if lines else adapter), lines

    def _one(self, adapter: Adapter, target: Target) -> Promoted | None:
        """Return one update that replaces all updates of a target, or None if they cannot be promoted."""
        group = adapter.updates[target]
        line = f"wrote {' and '.join(dict.fromkeys(update.method for update in group))} at {target} as"
        if len(group) == 1 and isinstance(group[0], LoRA):
            return None
        if len(group) == 1 and isinstance(group[0], Dense) and self.max_error is None:
            return self._of_difference(target, group[0], line) if self.identities else None
        exact = _in_factors(target, group, self.base)
        if exact is not None:
            _check_exact(target, group, exact, self.base)
            return target, exact, f"{line} a LoRA of rank {_rank(exact, target)}"
        alone = adapter.replace(updates={target: group}, foreign=None)
        try:
            if self.dense and not isinstance(group[0], Dense):
                return _difference(alone, self.base, line)
            return None if self.max_error is None else self._nearest(alone, self.max_error, line)
        except (NotMergeable, UsageError):
            return None

    def _of_difference(self, target: Target, update: Dense, line: str) -> Promoted | None:
        """Return an update that replaces a weight difference, for formats that cannot store one.

        The result is None if the difference cannot be replaced.
        """
        shape = weight_shape(target, [update], self.base)
        if not target.stacked and shape is not None and len(shape) > 1:
            exact = _by_identity(update, shape)
            _check_exact(target, [update], exact, self.base)
            return target, exact, f"{line} a LoRA of rank {_rank(exact, target)}, one factor of which is the identity"
        if self.whole and update.D is not None and update.d is None and self.base is not None:
            weight = _weight_at(target, update, self.base)
            if weight is not None:
                total = _when_read(lambda: Replacement(weight=_sum(weight, update), bias=None))  # type: ignore[arg-type]
                return target, total, f"{line} the whole weight, computed from the base's weight"
        return None

    def _nearest(self, alone: Adapter, error: float, line: str) -> Promoted | None:
        """Return the LoRA of the smallest rank for which the error is accepted."""
        from .ops import promote

        cuts: list[Any] = []
        promoted = promote(alone, error=error, base=self.base, report=cuts.append)
        target, group = next(iter(promoted.updates.items()))
        if len(group) != 1 or not isinstance(group[0], LoRA):
            return None
        lost = cuts[0].error / cuts[0].norm if cuts[0].norm else 0.0
        if lost > error * (1 + _SLACK) + _SLACK * 1e-2:
            why = f"its error is {lost:.1e} of the change, but only {error:.1e} is accepted"
            raise _mispromoted(target, next(iter(alone.updates.values())), why)
        _check_error(alone, target, group[0], lost, self.base)
        return target, group[0], f"{line} a LoRA of rank {_rank(group[0], target)}, relative error {lost:.1e}"


def _is_vector(group: Sequence[Update]) -> bool:
    """Whether all updates change norms or biases, which a LoRA cannot approximate."""
    return bool(group) and all(isinstance(update, Dense) and not _is_matrix(update) for update in group)


def _is_matrix(update: Dense) -> bool:
    """Whether a weight difference has an input and an output axis."""
    return update.D is not None and len(update.D.shape) > 1


def _by_identity(update: Dense, shape: Sequence[int]) -> LoRA:
    """Return a weight difference D as a LoRA of full rank: one factor is D, the other factor is an identity.

    The identity has the smaller of D's two sizes. If only the bias changes, the LoRA has two zero factors of rank 1;
    diffusers converts the `diff` of Wan's head in the same way.
    """
    out, columns = shape[0], math.prod(shape[1:])
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    kind = next(iter(leaves.values())).dtype
    if "D" not in leaves:
        A, B = _zeros((1, *shape[1:]), kind), _zeros((out, 1), kind)
    elif columns < out:
        A, B = _identity(columns, kind).reshape(columns, *shape[1:]), leaves["D"].reshape(out, columns)
    else:
        A, B = leaves["D"].reshape(*shape), _identity(out, kind)
    return LoRA(A=A, B=B, bias=leaves.get("d"), scaling=update.scaling)  # type: ignore[arg-type]


def _identity(size: int, kind: DType) -> Lazy:
    import numpy as np

    return computed((size, size), kind, lambda: np.eye(size))


def _zeros(shape: Shape, kind: DType) -> Lazy:
    import numpy as np

    return computed(shape, kind, lambda: np.zeros(shape))


def _weight_at(target: Target, update: Dense, base: Checkpoint) -> Lazy | None:
    """Return the base's stored parameter at a target; None if the base has no parameter of this name and shape."""
    try:
        site = bind(Adapter({target: (update,)}), base).sites[0]
    except AdapterkitError:
        return None
    weight = None if site.weight is None or target.rows is not None else base.tensors[site.weight]
    return weight if weight is not None and weight.shape == update.tensors["D"].shape else None


def _sum(weight: Lazy, update: Dense) -> Lazy:
    """Add a difference to a weight; round the sum once to the weight's dtype."""
    return rounded_lazy(load(weight) + load(update.tensors["D"]) * update.scaling, weight.dtype)


def _in_factors(target: Target, group: Sequence[Update], base: Checkpoint | None) -> Any:
    """Return one LoRA with the factors of all updates; None if an update lacks factors, or the shape is unknown."""
    from .ops.lowering import Change, low_rank

    additive = [u for u in group if isinstance(u, Additive) and type(u).pair is not Additive.pair]
    shape = weight_shape(target, additive, base) if len(additive) == len(group) else None
    if shape is None or len(shape) < 2:
        return None
    change, kind = Change(target, shape, tuple(additive)), _type(target, group)

    def factors() -> LoRA | None:
        deltas = [*change.deltas()]
        if any(delta.rest is not None for delta in deltas):
            return None  # The method has no low-rank factors for this weight, such as LoKr for convolutions.
        return low_rank(target, shape, [_of_rank_one(each) for each in deltas], change.bias(), kind)

    return _when_read(factors)


def _of_rank_one(delta: Delta) -> tuple[Array, Array]:
    """Return B and A; if their rank is 0, which formats cannot store, return zero factors of rank 1."""
    import numpy as np

    out, columns = delta.shape
    return (delta.B, delta.A) if delta.rank else (np.zeros((out, 1)), np.zeros((1, columns)))


def _difference(alone: Adapter, base: Checkpoint | None, line: str) -> Promoted | None:
    """Return the sum of all updates' changes to the weight, as one weight difference."""
    from .ops.alignment import places
    from .ops.lowering import dense

    _, (place,) = places([alone], base=base, lower="promoted")
    change, kind = place.changes()[0], _type(place.target, place.all_updates)
    if change is None:
        return None

    def promoted_difference() -> Dense:
        whole = [delta.dense() for delta in change.deltas()] if change.changes_weight else None
        return dense(place.target, place.shape, whole, change.bias(), kind)

    promoted = _when_read(promoted_difference)
    _check_error(alone, place.target, promoted, 0.0, base)
    return place.target, promoted, f"{line} a weight difference"


def _check_exact(target: Target, group: Sequence[Update], promoted: Update, base: Checkpoint | None) -> None:
    """Check with random inputs that the promoted update equals the sum of the original updates.

    Raises:
        Miswritten: the promoted update is not the sum of the original updates.
    """
    # Pass the promoted update first: its dtype decides the tolerance, and the originals may have a narrower dtype.
    if why := unlike({target: (promoted,)}, {target: tuple(group)}, base, frozenset()):
        raise _mispromoted(target, group, why)


def _check_error(alone: Adapter, target: Target, promoted: Update, stated: float, base: Checkpoint | None) -> None:
    """Check that a promoted update differs from the adapter's original change by no more than the reported error.

    The original change is computed again, with the base's weight if the formula reads it. A reported error of 0 still
    allows rounding.

    Args:
        alone: the adapter with one target.
        target: the target of the promoted update.
        promoted: a LoRA or a weight difference.
        stated: the relative Frobenius error that was reported to the caller.
        base: the base, for formulas that read the weight.

    Raises:
        Miswritten: the actual error is larger than the reported error.
    """
    import numpy as np

    (given, group), *_ = alone.updates.items()
    if not promoted.changes_weight:
        return
    D = alone.delta(given.path, None if all(isinstance(u, Additive) for u in group) and _shaped(alone) else base)
    change = Adapter({target: (promoted,)}).delta(target.path)
    norm = float(np.linalg.norm(D.numpy().astype("f8")))
    error = float(np.linalg.norm((D.double() - change.double().reshape(D.shape)).numpy())) / norm if norm else 0.0
    if error > stated * (1 + _SLACK) + _SLACK * 1e-2:
        raise _mispromoted(given, group, f"the error is {error:.1e} of the change, not {stated:.1e}")


def _shaped(alone: Adapter) -> bool:
    """Whether the shape of the weight follows from the updates alone, without a base."""
    try:
        return all(bool(view_shape(target, group)) for target, group in alone.updates.items())
    except UsageError:
        return False


def _mispromoted(target: Target, group: Sequence[Update], why: str) -> Miswritten:
    names = " and ".join(dict.fromkeys(update.method for update in group))
    return Miswritten(f"the promoted form of {names} differs: {why}", where=str(target), cure=_REPORT)


def _type(target: Target, group: Sequence[Update]) -> DType:
    from .ops.lowering import result_type

    return result_type([Adapter({target: tuple(group)})], None)


def _when_read(make: Callable[[], Any]) -> Any:
    """Return the update that `make` returns, with tensors that call `make` again at each access, to save memory.

    Return None if `make` returns None.
    """
    first = make()
    if first is None:
        return None

    def leaf(name: str, like: Any) -> Any:
        return computed(like.shape, like.dtype, lambda: load(make().tensors[name]))

    return first.replace(**{name: leaf(name, like) for name, like in first.tensors.items()})


def _rank(update: LoRA, target: Target) -> int:
    return int(update.A.shape[int(target.stacked)])
