"""Folds: what each adapter does to each stored tensor of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..binding import Site, bind
from ..errors import NotMergeable
from ..names.resolver import Rule
from ..names.ties import find_tie
from ..quant import Dequantized
from ..tensors.locations import is_repo
from .fold import Fold
from .ties import parse_tied, settle_tie

if TYPE_CHECKING:
    from ..adapter import Adapter, Target
    from ..tensors.checkpoint import Checkpoint
    from ..tensors.lazy import Lazy


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


def folds_by_tensor(
    base: Checkpoint,
    adapters: Sequence[tuple[str, Adapter, float]],
    tied: str | None,
    allow_partial: bool,
    rename: Sequence[str] = (),
) -> tuple[tuple[Source, ...], dict[str, tuple[Fold, ...]], dict[str, str], dict[str, Any], list[str]]:
    """Binds the adapters and sorts their updates by stored tensor.

    Returns:
        the bound sources; output name -> folds; output name -> stored name it is made from; changes to the config;
        warnings.
    """
    tied = parse_tied(tied)
    config = base.config
    if isinstance(base, Dequantized) and base.scheme == "gguf" and "lm_head.weight" not in base.tensors:
        # llama.cpp computes with token_embd.weight where output.weight is missing, whatever else says so.
        config = {**(config or {}), "tie_word_embeddings": True}
    tie = find_tie(base.tensors, config)
    aliases = {} if tie is None else tie.aliases
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
    bound_adapters = [source.adapter for source in sources]
    warnings: list[str] = []
    changes = {} if tie is None else settle_tie(tie, folds, names, bound_adapters, tied, config, warnings)
    return tuple(sources), {name: tuple(found) for name, found in folds.items()}, names, changes, warnings


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
