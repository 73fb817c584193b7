"""Read several adapters and collect their updates target by target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Target
from ..core.updates import Additive
from ..errors import PASS_AN_ADAPTER, PASS_BASE, ShapeMismatch, UsageError, nearest
from ..formats import read
from ..formats._image.translate import in_one_naming
from ..io.checkpoint import opened
from ..naming.binding import renamed, weight_shape
from ..naming.binding.fitting import check_base
from ..naming.binding.moving import by_expert, by_rows
from .lowering import Change, Delta, additive, bound

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.lazy import Shape
    from .lowering import Base

    Source = Adapter | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class AlignedPlace:
    """The updates of several adapters at one target.

    Attributes:
        target: the target.
        updates: each adapter's updates of the target, in the order of the adapters; `()` for an adapter that does not
            change the target.
        base: the base, if one was given.
    """

    target: Target
    updates: tuple[tuple[Update, ...], ...]
    base: Base | None = None

    @property
    def all_updates(self) -> list[Update]:
        return [update for group in self.updates for update in group]

    @cached_property
    def shape(self) -> Shape:
        """The weight's shape, `[out, in, *k]`; for stacked experts, one expert's shape. `[out]` if only a bias changes.

        Raises:
            ShapeMismatch: the adapters were made for weights of different shapes.
            UsageError: no base was given, and the shapes of the updates do not determine the weight's shape.
        """
        known = [weight_shape(self.target, group, self.base) if group else None for group in self.updates]
        longest = max((shape for shape in known if shape is not None), key=len, default=None)
        if longest is None:
            raise UsageError(
                "the shape of this weight is unknown without a base", where=str(self.target), cure=PASS_BASE
            )
        changing = [any(update.changes_weight for update in group) for group in self.updates]
        for shape in (shape for shape, changes in zip(known, changing, strict=True) if changes and shape is not None):
            # Compare the element counts, not the shapes. For a convolution, some methods store only the product in * k,
            # so `in` and the kernel's sizes are unknown.
            if shape[0] != longest[0] or math.prod(shape) != math.prod(longest):
                why = f"the adapters were made for weights of the shapes {list(longest)} and {list(shape)}"
                raise ShapeMismatch(why, where=str(self.target), cure="Combine only adapters made for the same base")
        return longest

    def changes(self, weights: Sequence[float] | None = None) -> tuple[Change | None, ...]:
        """Return each adapter's change, multiplied by the adapter's weight; None if the adapter lacks this target.

        Raises:
            ShapeMismatch, UsageError: see `shape`.
            AssertionError: an update is not additive. `lowering.additive` replaces such updates, if possible.
        """
        shape, factors = self.shape, weights or [1.0] * len(self.updates)
        changes: list[Change | None] = []
        for group, weight in zip(self.updates, factors, strict=True):
            terms = tuple(update for update in group if isinstance(update, Additive))
            assert len(terms) == len(group)
            changes.append(Change(self.target, shape, terms, weight) if terms else None)
        return tuple(changes)


def side_by_side(changes: Sequence[Change | None]) -> Iterator[tuple[Delta | None, ...]]:
    """Yield one tuple for a single weight, or one tuple per expert for stacked experts.

    Each tuple contains the changes of all adapters; None for an adapter that does not change the weight.
    """
    running = [None if change is None or not change.changes_weight else change.deltas() for change in changes]
    # A generator object is true even if it is exhausted, so this loop does not end by itself if at least one adapter
    # changes the weight. The function returns when all generators are exhausted.
    while any(running):
        row = tuple(None if each is None else next(each, None) for each in running)
        if not any(row):
            return
        yield row


def places(
    adapters: Sequence[Source],
    *,
    base: Base | None = None,
    lower: str | None = None,
    disjoint: bool = False,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> tuple[list[Adapter], list[AlignedPlace]]:
    """Read adapters, bind them to the base if there is one, and collect their updates target by target.

    Args:
        adapters: adapters or their paths.
        base: the base. All adapters are bound to the base's names and layouts, and some methods need its weights.
        lower: if None, all updates stay as they are. Otherwise, all updates are made additive: an update that is not
            additive becomes a difference from the base's weights. If that is impossible, the error message contains
            the value of `lower`, a participle such as `"combined"`.
        disjoint: whether to allow adapters that have no target in common.
        rename: rules that rename targets, each `FROM=TO` or `@FILE`. Each rule must match a target of at least one
            adapter.
        strict_base: whether to refuse a base that differs from the base that an adapter records.

    Raises:
        CheckFailed: the base differs from the base that an adapter records, and `strict_base` is set.
        UsageError: no adapter is given; an adapter has no target in common with the adapters before it, and `disjoint`
            is not set; or adapters belong to different image models.
        ShapeMismatch: two adapters assume different layouts of the same weight in the base, different numbers of
            stacked experts, or different sizes of the output.
        NotMergeable, TargetNotFound: see `lowering.additive` and `Adapter.bind`.
    """
    if not adapters:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    base = None if base is None else opened(base)
    given = [source_adapter(adapter, base) for adapter in adapters]
    if strict_base:
        named = [
            source if isinstance(source, str | PathLike) else f"adapter {n}" for n, source in enumerate(adapters, 1)
        ]
        check_base([(str(name), adapter) for name, adapter in zip(named, given, strict=True)], base, strict=True)
    given = renamed(given, rename)
    read = _in_one_naming(given if base is None else [bound(adapter, base)[0] for adapter in given])
    # One adapter may target a stack of experts or a fused weight, while another adapter targets single experts or parts
    # of the fused weight. Split the stacks and the fused weights. With a base, `bound` has already split the stacks.
    if base is None and len(read) > 1:
        read = by_expert(read)
    if len(read) > 1:
        read = by_rows(_at_modules(read))
    if lower is not None:
        read = [additive(adapter, base, lower) for adapter in read]
    if not disjoint:
        _check_common(read)
    _check_layouts(read)
    targets = dict.fromkeys(target for adapter in read for target in adapter.updates)
    aligned = [AlignedPlace(t, tuple(tuple(a.updates.get(t, ())) for a in read), base) for t in targets]
    for place in aligned if len(read) > 1 else ():
        _check_sizes(place)
    return read, aligned


def source_adapter(source: Source, base: Base | None) -> Adapter:
    """Return `source` if it is a valid adapter; if `source` is a path, read and return the adapter at this path."""
    if isinstance(source, Adapter):
        source.validate()
        return source
    return read(source, base=base)


def _in_one_naming(adapters: list[Adapter]) -> list[Adapter]:
    """Rename the targets of image-model adapters, so that all adapters use the same name for the same module.

    Each tool that trains such adapters has its own names.
    """
    if len(adapters) < 2:
        return adapters
    named = in_one_naming([adapter.updates for adapter in adapters])
    return [a if u is a.updates else a.replace(updates=u) for a, u in zip(adapters, named, strict=True)]


def _at_modules(adapters: list[Adapter]) -> list[Adapter]:
    """Rename a parameter's target `X.weight` to `X` if another adapter has the module `X` as its target.

    PEFT adapts the routers of experts as parameters; other tools, and `extract`, name the module.
    """
    known = {target for adapter in adapters for target in adapter.updates}

    def at_module(target: Target, taken: Mapping[Target, object]) -> Target:
        module = replace(target, path=target.path.removesuffix(".weight"))
        return module if module in known and module not in taken else target

    result = []
    for adapter in adapters:
        names = {target: at_module(target, adapter.updates) for target in adapter.updates}
        same = all(target is name for target, name in names.items())
        updates = {names[target]: group for target, group in adapter.updates.items()}
        result.append(adapter if same else adapter.replace(updates=updates))
    return result


def _check_common(adapters: Sequence[Adapter]) -> None:
    """Raise UsageError if an adapter has no target in common with the adapters before it.

    The usual cause is that the adapters use different names for the same modules.
    """
    first = {target.path for target in adapters[0].updates}
    for adapter in adapters[1:]:
        paths = {target.path for target in adapter.updates}
        if not first & paths:
            path = next(iter(paths))
            near = nearest(path, first)
            cure = f"{near}. " if near else ""
            cure += "Align names with --base (base=) or --rename (rename=), or pass --disjoint (disjoint=)"
            raise UsageError("the adapters have no target in common", where=path, cure=cure)
        first |= paths


def _check_sizes(place: AlignedPlace) -> None:
    """Raise ShapeMismatch if two adapters change different numbers of experts, or biases of different sizes.

    `AlignedPlace.shape` compares the shapes of weights. It sees only one expert's weight, and no bias.
    """
    seen: dict[str, object] = {}
    for update in place.all_updates:
        if update.kind not in ("additive", "weight"):
            continue
        dims = update.dims(place.target.stacked)
        for axis in ("e", "out"):
            size = dims.get(axis)
            if size is not None and seen.setdefault(axis, size) != size:
                why = f"the adapters were made for weights of different sizes: {axis} is {seen[axis]} and {size}"
                raise ShapeMismatch(why, where=str(place.target), cure="Combine only adapters made for the same base")


def _check_layouts(adapters: Sequence[Adapter]) -> None:
    seen: dict[tuple[str, tuple[int, int] | None], Target] = {}
    for adapter in adapters:
        for target in adapter.updates:
            other = seen.setdefault((target.path, target.rows), target)
            if other.layout != target.layout:
                why = (
                    f"one adapter assumes that the base stores this weight as [{other.layout}], "
                    f"another adapter assumes [{target.layout}]"
                )
                raise ShapeMismatch(why, where=str(target), cure=PASS_BASE)
