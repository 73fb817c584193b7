"""Folds: what each adapter does to each stored tensor of a base; and the choice that tied weights ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..binding import Site, bind
from ..errors import AdapterkitError, NotMergeable, UsageError
from ..names.resolver import Rule
from ..names.ties import find_tie
from ..tensors.lazy import as_lazy
from ..tensors.locations import is_repo
from ..updates import Additive, Update

if TYPE_CHECKING:
    from ..adapter import Adapter, Target
    from ..tensors.checkpoint import Checkpoint
    from ..tensors.lazy import Lazy

TIED = ("merge", "untie")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One adapter of a merge, bound to the base."""

    name: str
    adapter: Adapter
    weight: float
    digest: str
    missing: tuple[Target, ...]
    renamed: tuple[str, str] | None
    rules: tuple[Rule, ...] = ()

    def record(self) -> dict[str, Any]:
        """What it is; of the base it was made for the name on a hub, and no path of somebody's disk."""
        made_for = self.adapter.base.id if self.adapter.base else None
        return {
            "name": self.name, "digest": self.digest, "weight": self.weight, "targets": len(self.adapter.updates),
            "missing": [str(target) for target in self.missing], "base": made_for if is_repo(made_for) else None,
            "methods": list(self.adapter.methods), "ranks": list(self.adapter.ranks),
            "lineage": [step.op for step in self.adapter.recipe], **self._names(),
        }  # fmt: skip

    def _names(self) -> dict[str, Any]:
        """The rules by which names were changed; nothing where all are the base's own."""
        used = [rule for rule in self.rules if rule.kind != "exact"]
        return {"names": [{"rule": str(rule), "targets": rule.targets} for rule in self.rules]} if used else {}


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What one adapter does to one stored tensor.

    Attributes:
        target: where and in which layout.
        updates: the updates to apply, in order.
        weight: how much of the change is taken.
        source: position of the adapter in the merge.
        bias: the stored tensor is the target's bias, not its weight.
        shape: of the stored tensor.
        seen: the base's weight, where the change to its bias needs it.
    """

    target: Target
    updates: tuple[Update, ...]
    weight: float
    source: int
    bias: bool
    shape: tuple[int, ...]
    seen: Lazy | None = None

    @property
    def additive(self) -> bool:
        return all(isinstance(update, Additive) for update in self.updates)

    @property
    def axis(self) -> str:
        """The axis of the update's view that runs along the stored tensor's rows."""
        return "in" if self.target.layout.removeprefix("e ").startswith("in") else "out"

    @property
    def blockable(self) -> bool:
        """Whether a block of stored rows can be computed without the others."""
        return not self.bias and all(update.cuts(self.axis) for update in self.updates)


def folds_by_tensor(
    base: Checkpoint,
    adapters: Sequence[tuple[str, Adapter, float]],
    tied: str | None,
    allow_partial: bool,
    rename: Sequence[str] = (),
) -> tuple[tuple[Source, ...], dict[str, tuple[Fold, ...]], dict[str, str], dict[str, Any]]:
    """Binds the adapters and sorts their updates by stored tensor.

    Returns:
        the bound sources; output name -> folds; output name -> stored name it is made from; changes to the config.
    """
    if tied is not None and tied not in TIED:
        raise UsageError(f"unknown choice {tied!r} for tied weights", cure=f"Known: {', '.join(TIED)}")
    tie = find_tie(base.tensors, base.config)
    aliases = {} if tie is None else {tie[0]: tie[1]}
    sources, folds = [], dict[str, list[Fold]]()
    for position, (name, adapter, weight) in enumerate(adapters):
        _refuse_other_laws(adapter)
        bound = bind(adapter, base, partial=allow_partial, aliases=aliases, rename=rename)
        digest = adapter.digest()
        sources.append(Source(name, bound.adapter, weight, digest, bound.missing, bound.renamed, bound.rules))
        for site in bound.sites:
            for stored, fold in _folds(site, weight, position, base, aliases):
                folds.setdefault(stored, []).append(fold)
    names = {name: name for name in base.tensors}
    changes = {} if tie is None else _settle_tie(tie, folds, names, tied)
    return tuple(sources), {name: tuple(found) for name, found in folds.items()}, names, changes


def _refuse_other_laws(adapter: Adapter) -> None:
    """Before any name is looked up: what is not of weights has no place among them."""
    for target, update in adapter:
        if update.kind not in ("additive", "weight"):
            why = f"{update.method} changes {update.acts_on}, not weights"
            raise NotMergeable(why, where=str(target), cure="Inject it into a live model instead")


def _folds(
    site: Site, weight: float, position: int, base: Checkpoint, aliases: Mapping[str, str]
) -> list[tuple[str, Fold]]:
    found = []
    for stored, bias in ((site.weight, False), (site.bias, True)):
        updates = tuple(u for u in site.updates if (u.changes_bias if bias else u.changes_weight))
        if stored is not None and updates:
            shape = base.tensors[aliases.get(stored, stored)].shape
            seen = _seen(site, base, aliases) if bias else None
            found.append((stored, Fold(site.target, updates, weight, position, bias, shape, seen)))
    return found


def _seen(site: Site, base: Checkpoint, aliases: Mapping[str, str]) -> Lazy | None:
    """The weight that a change to its bias needs; it must be the base's own."""
    needy = [
        position for position, update in enumerate(site.updates) if update.bias_sees_weight and update.changes_bias
    ]
    if not needy or site.weight is None:
        return None
    if any(update.changes_weight for update in site.updates[: needy[-1]]):
        why = f"{site.updates[needy[-1]].method} changes the bias by a weight that another update changes before it"
        raise NotMergeable(why, where=str(site.target), cure="Merge one adapter after the other")
    return base.tensors[aliases.get(site.weight, site.weight)]


def _settle_tie(
    tie: tuple[str, str], folds: dict[str, list[Fold]], names: dict[str, str], tied: str | None
) -> dict[str, Any]:
    head, embedding = tie
    touched = [name for name in tie if name in folds]
    if not touched:
        return {}
    if tied is None:
        raise UsageError(
            f"the base ties {head} to {embedding}: one tensor, and the adapter changes {' and '.join(touched)}",
            where=touched[0],
            cure="Choose --tied untie (write the head apart; each gets its own change, as in training) or "
            "--tied merge (fold every change into the one shared tensor, which changes both)",
        )
    if tied == "untie":
        names[head] = embedding
        return {"tie_word_embeddings": False}
    of_head, of_embedding = folds.pop(head, []), folds.get(embedding, [])
    if len(touched) == 2 and _same_replacement(of_head, of_embedding):
        return {}
    both = [*of_embedding, *of_head]
    if len(touched) == 2 and not all(fold.additive for fold in both):
        raise AdapterkitError(
            f"{head} and {embedding} are changed in ways that cannot share one tensor", where=head,
            cure="Choose --tied untie",
        )  # fmt: skip
    folds[embedding] = both
    return {}


def _same_replacement(one: list[Fold], other: list[Fold]) -> bool:
    """Whether both are the same whole weight, as files have it that were saved from tied layers."""
    if not len(one) == len(other) == 1 or not len(one[0].updates) == len(other[0].updates) == 1:
        return False
    weights = [fold.updates[0].tensors for fold in (one[0], other[0])]
    if any(set(tensors) != {"weight"} for tensors in weights) or one[0].weight != other[0].weight:
        return False
    a, b = (as_lazy(tensors["weight"]) for tensors in weights)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bytes(a.fetch()) == bytes(b.fetch())
