"""Write an adapter in any format; with `on_loss="promote"`, also convert updates to methods that the format supports.

A writer first checks all updates. If the format cannot express some updates, the writer writes nothing and raises
`Unrepresentable`; the error's `places` lists the refused updates. *Promotion* converts the refused updates to other
methods and calls the writer again. Updates with low-rank factors become a LoRA that is built from these factors,
without a decomposition. Other updates become a weight difference (`Dense`) if the format supports weight differences,
or the nearest LoRA if the caller accepts an error (`max_error`). Promotion needs `adapterkit.ops`. The modules in
`formats` may not import `adapterkit.ops`, so promotion is in this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from .core.adapter import Adapter, check_adapter
from .core.arguments import checks_types
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

ACCEPT = (
    "Accept an approximation error with --max-error E (max_error=E), pass --base BASE (base=) if a method's formula "
    "needs the base's weights, or write another format"
)

_REPORT = "Nothing was written. Report this bug, or write adapterkit's own format"
_SLACK = 1e-4
"""A promotion with the error limit E is accepted if its measured relative error is at most
`E * (1 + _SLACK) + _SLACK / 100`. The slack is needed because the tensors are rounded to float32."""

Written = list[str]
Ask = Callable[["Adapter"], Written]
Promoted = tuple["Target", "Update", str]
"""The promotion of one target: the target, the new update that replaces all updates there, and a line for the user."""


@checks_types
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
    """Validate and write an adapter; return one line for each omitted or rewritten update.

    `Format.write` describes the lines. In every format, the output is written next to `path` and renamed to `path` when
    the output is complete, so `path` is unchanged after an error. If `path` is a folder with an adapter, the files that
    the format owns are replaced, and all other files stay.

    Before the rename, the output is read back and compared with the adapter; a difference raises `Miswritten`.

    Args:
        adapter: the adapter to write.
        path: the file or folder to write.
        format: the format to write.
        base: the base. Some formats need it to resolve names or to order the rows of weights.
        on_loss: what to do with updates that the format cannot express; see `Format.write`.
        profile: a program that will load the output and supports only a part of the format, such as `"vllm"`.
            Scalings that the program ignores are folded into the tensors. If the program supports only one rank for all
            modules, smaller ranks are padded with zeros. Updates that the program cannot run are refused.
        max_error: with `on_loss="promote"`, a change that the format cannot store exactly may become a LoRA with at
            most this relative Frobenius error. None accepts only exact replacements.
        overwrite: whether to replace an existing file or folder at `path`. If False, an existing path is an error.
        made_from: a digest of all inputs and options. The digest is stored with the output, so that a later run with
            the same digest can skip the work; see `adapterkit.io.staging`.

    Raises:
        StorageError: `path` exists and `overwrite` is False, `path` is neither a file nor a folder, another process is
            writing `path`, or the disk is full.
        Miswritten: the written files differ from the adapter; the error names the target and the field.
        UsageError: the format needs the base to read the files back, but no base was given; or `max_error` is not
            between 0 and 1, or is given without `on_loss="promote"`.
        AdapterkitError: see `Format.write`.
    """
    check_adapter(adapter)
    if max_error is not None and (on_loss != "promote" or not 0 < max_error < 1):
        raise UsageError(
            f"max_error must be between 0 and 1 and needs on_loss='promote', got {max_error} with on_loss={on_loss!r}",
            cure="Pass a number between 0 and 1, with on_loss='promote'/--on-loss promote",
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
    """Replace updates that a format refuses by updates of methods that the format supports.

    The new updates are equivalent to the original updates, or approximate them within `max_error`.

    Attributes:
        lora: whether the format supports LoRA.
        dense: whether the format supports weight differences (`Dense`).
        identities: whether a weight difference may become a LoRA of full rank, with the identity as one factor.
        whole: whether a weight difference may become a whole weight: the base's weight plus the difference.
        max_error: the accepted relative Frobenius error of each change; None accepts only exact replacements.
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
        """Write the adapter by calling `write`. While `write` refuses updates, promote these updates and try again.

        Returns:
            A line for each promoted target, and then the lines that `write` returned.

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
                    # None of the refused updates can be promoted. The writer may refuse a LoRA because of updates at
                    # other targets, so promote all targets.
                    changed, promotion_lines = self._promoted(adapter, {*adapter.updates} if refused else set())
                if not promotion_lines:
                    if any(not _is_vector(adapter.updates.get(target, ())) for target in refused):
                        refusal.cure = ACCEPT
                    raise
                adapter, lines = changed, lines + promotion_lines

    def suggest(self, adapter: Adapter, refusal: Unrepresentable) -> None:
        """Recommend promotion in the error's cure if promotion can replace all refused updates without loss."""
        refused = {target for target, _ in refusal.places}
        groups = [adapter.updates.get(target, ()) for target in refused]
        if groups and all(self._is_exact(each) for each in groups):
            promote = "Convert the updates to another method without loss, with on_loss='promote'/--on-loss promote"
            refusal.cure = f"{promote}. Or: {refusal.cure}" if refusal.cure else promote

    def _is_exact(self, group: Sequence[Update]) -> bool:
        """Whether promotion can replace the updates of a target by one new update without loss.

        False for a single LoRA, which is never promoted. True for a single weight difference only if it changes a
        matrix and `identities` is True.
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
        """Promote all updates of a target to one new update. Return None if the updates cannot be promoted."""
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
            if self.dense and not (len(group) == 1 and isinstance(group[0], Dense)):
                return _difference(alone, self.base, line)
            return None if self.max_error is None else self._nearest(alone, self.max_error, line)
        except (NotMergeable, UsageError):
            return None

    def _of_difference(self, target: Target, update: Dense, line: str) -> Promoted | None:
        """Promote a weight difference, for a format that cannot store weight differences.

        The new update is a LoRA with the identity as one factor, or a whole weight: the base's weight plus the
        difference. Return None if neither is possible.
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
        """Promote the updates of a target to a LoRA with a relative error of at most `error`.

        The LoRA has the smallest rank that achieves this error. Return None if the result is not a single LoRA.
        """
        from .ops import promote

        cuts: list[Any] = []
        promoted = promote(alone, error=error, base=self.base, report=cuts.append)
        target, group = next(iter(promoted.updates.items()))
        if len(group) != 1 or not isinstance(group[0], LoRA):
            return None
        lost = cuts[0].error / cuts[0].norm if cuts[0].norm else 0.0
        if lost > error * (1 + _SLACK) + _SLACK * 1e-2:
            why = f"the relative error of the LoRA is {lost:.1e}, but at most {error:.1e} is accepted"
            raise _mispromoted(target, next(iter(alone.updates.values())), why)
        _check_error(alone, target, group[0], lost, self.base)
        return target, group[0], f"{line} a LoRA of rank {_rank(group[0], target)}, relative error {lost:.1e}"


def _is_vector(group: Sequence[Update]) -> bool:
    """Whether all updates change only vectors (norms or biases), which a LoRA cannot approximate."""
    return bool(group) and all(isinstance(update, Dense) and not _is_matrix(update) for update in group)


def _is_matrix(update: Dense) -> bool:
    """Whether an update changes a weight with an input and an output axis, not only a vector."""
    return update.D is not None and len(update.D.shape) > 1


def _by_identity(update: Dense, shape: Sequence[int]) -> LoRA:
    """Return a weight difference D as a LoRA of full rank: one factor is D, the other factor is the identity.

    The identity's size is the smaller of `out` and `in * k`. The diffusers library also makes a LoRA with an identity
    factor: it converts the `diff` tensor of a Wan model's head to such a LoRA.

    If `update` changes only the bias, both factors are zeros of rank 1.
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
    """Return the base's stored weight at a target.

    Return None if the target is only some rows of a weight, if the base stores no weight at the target, or if this
    weight and the difference in `update` have different shapes.
    """
    try:
        site = bind(Adapter({target: (update,)}), base).sites[0]
    except AdapterkitError:
        return None
    weight = None if site.weight is None or target.rows is not None else base.tensors[site.weight]
    return weight if weight is not None and weight.shape == update.tensors["D"].shape else None


def _sum(weight: Lazy, update: Dense) -> Lazy:
    """Return the weight plus the scaled difference, rounded once to the weight's dtype."""
    return rounded_lazy(load(weight) + load(update.tensors["D"]) * update.scaling, weight.dtype)


def _in_factors(target: Target, group: Sequence[Update], base: Checkpoint | None) -> Any:
    """Return one LoRA that concatenates the factors of all updates.

    Return None if an update has no low-rank factors, or if the shape of the weight is unknown.
    """
    from .ops.lowering import Change, low_rank

    additive = [u for u in group if isinstance(u, Additive) and type(u).pair is not Additive.pair]
    shape = weight_shape(target, additive, base) if len(additive) == len(group) else None
    if shape is None or len(shape) < 2:
        return None
    change, kind = Change(target, shape, tuple(additive)), _type(target, group)

    def factors() -> LoRA | None:
        deltas = [*change.deltas()]
        if any(delta.rest is not None for delta in deltas):
            return None  # An update has no low-rank factors, for example a LoKr update with `stacked=True`.
        return low_rank(target, shape, [_of_rank_one(each) for each in deltas], change.bias(), kind)

    return _when_read(factors)


def _of_rank_one(delta: Delta) -> tuple[Array, Array]:
    """Return B and A. If their rank is 0, return zeros of rank 1, because formats cannot store factors of rank 0."""
    import numpy as np

    out, columns = delta.shape
    return (delta.B, delta.A) if delta.rank else (np.zeros((out, 1)), np.zeros((1, columns)))


def _difference(alone: Adapter, base: Checkpoint | None, line: str) -> Promoted | None:
    """Promote all updates to one weight difference: the sum of their changes. Return None if nothing changes."""
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
    """Check with random inputs that the promoted update computes the same function as the original updates together.

    Raises:
        Miswritten: the functions differ.
    """
    # Pass the promoted update first, because the dtype of the first argument decides the tolerance. The original
    # updates may have a narrower dtype, which would make the tolerance larger.
    if why := unlike({target: (promoted,)}, {target: tuple(group)}, base, frozenset()):
        raise _mispromoted(target, group, why)


def _check_error(alone: Adapter, target: Target, promoted: Update, stated: float, base: Checkpoint | None) -> None:
    """Check that a promoted update differs from the original weight change by no more than the reported error.

    The original change is computed again. If its formula reads the base's weight, the weight is read from `base`. Even
    with a reported error of 0, differences from rounding are allowed.

    Args:
        alone: an adapter with only the original updates of one target.
        target: the target of the promoted update.
        promoted: a LoRA or a weight difference.
        stated: the reported relative Frobenius error.
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
        raise _mispromoted(given, group, f"the relative error is {error:.1e}, but {stated:.1e} was reported")


def _shaped(alone: Adapter) -> bool:
    """Whether the updates alone determine the shape of the weight, so that no base is needed."""
    try:
        return all(bool(view_shape(target, group)) for target, group in alone.updates.items())
    except UsageError:
        return False


def _mispromoted(target: Target, group: Sequence[Update], why: str) -> Miswritten:
    names = " and ".join(dict.fromkeys(update.method for update in group))
    return Miswritten(
        f"the promoted update does not match the original {names}: {why}", where=str(target), cure=_REPORT
    )


def _type(target: Target, group: Sequence[Update]) -> DType:
    from .ops.lowering import result_type

    return result_type([Adapter({target: tuple(group)})], None)


def _when_read(make: Callable[[], Any]) -> Any:
    """Call `make`, and return the resulting update with lazy tensors. Return None if `make` returns None.

    The tensors are not kept in memory: each time that a tensor's data is read, `make` is called again.
    """
    first = make()
    if first is None:
        return None

    def leaf(name: str, like: Any) -> Any:
        return computed(like.shape, like.dtype, lambda: load(make().tensors[name]))

    return first.replace(**{name: leaf(name, like) for name, like in first.tensors.items()})


def _rank(update: LoRA, target: Target) -> int:
    return int(update.A.shape[int(target.stacked)])
