"""Bind the adapters of a merge to the base, and group their updates by stored tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..errors import INJECT_INSTEAD, NotMergeable
from ..formats._trained import sites_as_trained
from ..io.locations import is_repo
from ..naming.binding import Site, bind
from ..naming.moves import MoveRule
from ..naming.renames import parse_renames
from ..naming.ties import find_tie, is_head
from ..quant import Dequantized
from .planned_update import PlannedUpdate, SeenWeight
from .ties import MERGE, parse_tied, refuse_tied_part, settle_tie
from .vocabulary import Vocabulary, parse_vocab

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True, eq=False)
class AdapterSource:
    """One adapter of a merge, bound to the base.

    Attributes:
        name: the name of the adapter's file or folder.
        given: the adapter as it was read.
        adapter: the adapter, bound to the base.
        weight: the factor by which the adapter's change is multiplied.
        missing: the adapter's targets that the base does not have.
        renamed: (removed prefix, added prefix), if prefixes of the adapter's names had to be changed to find the names
            in the base. If several prefixes were changed, this is the first change. None if no prefix was changed.
        rules: the rules that mapped the adapter's names to names in the base.
    """

    name: str
    given: Adapter
    adapter: Adapter
    weight: float
    missing: tuple[Target, ...]
    renamed: tuple[str, str] | None
    rules: tuple[MoveRule, ...] = ()
    _digest: str | None = field(default=None, init=False)

    @property
    def digest(self) -> str:
        """The digest of the adapter as it was read. The first access computes it, which reads all tensors."""
        if self._digest is None:
            object.__setattr__(self, "_digest", self.given.digest())
        return cast(str, self._digest)

    def record(self, digests: bool = True) -> dict[str, JsonValue]:
        """Return plain data about the adapter.

        The key `base` has the base's name on a hub, as the adapter's file gives it. It is null if the file gives no
        base, or only a path.

        Args:
            digests: whether to include the digest; computing it reads all tensors. If False, the digest is null.
        """
        made_for = self.adapter.base.id if self.adapter.base else None
        return {
            "name": self.name, "digest": self.digest if digests else None, "weight": self.weight,
            "targets": len(self.adapter.updates), "missing": [str(target) for target in self.missing],
            "base": made_for if is_repo(made_for) else None, "methods": list(self.adapter.methods),
            "ranks": list(self.adapter.ranks), "lineage": [step.op for step in self.adapter.recipe], **self._names(),
        }  # fmt: skip

    def _names(self) -> dict[str, JsonValue]:
        """Return {"names": the rules that mapped names}; empty if the base has all names of the adapter."""
        used = [rule for rule in self.rules if rule.kind != "exact"]
        return {"names": [{"rule": str(rule), "targets": rule.targets} for rule in self.rules]} if used else {}


@dataclass(frozen=True, slots=True, eq=False)
class Bindings:
    """The adapters of a merge, bound to the base.

    Attributes:
        base: the base, with rows added if the vocabulary grows.
        sources: the bound adapters.
        folds: a map from output tensors to their planned updates.
        names: a map from each output tensor to the base's stored tensor from which it is computed.
        config_changes: a map from keys of `config.json` to new values.
        warnings: the warnings for the user, each a sentence.
        vocabulary: plain data about a changed vocabulary; None if the base's vocabulary is kept.
    """

    base: Checkpoint
    sources: tuple[AdapterSource, ...]
    folds: dict[str, tuple[PlannedUpdate, ...]]
    names: dict[str, str]
    config_changes: dict[str, Any]
    warnings: list[str]
    vocabulary: dict[str, Any] | None


def folds_by_tensor(
    base: Checkpoint,
    adapters: Sequence[tuple[str, Adapter, float]],
    tied: str | None,
    allow_partial: bool,
    rename: Sequence[str] = (),
    vocab: str | None = None,
) -> Bindings:
    """Bind the adapters to the base, and group their updates by stored tensor.

    Args:
        base: the base.
        adapters: (name, adapter, weight) of each adapter.
        tied: the choice for tied weights, see `parse_tied`.
        allow_partial: whether to skip targets that the base does not have.
        rename: the user's rules that map names in the adapters to names in the base.
        vocab: what to do if an adapter was trained with more tokens than the base has, see `Vocabulary`.

    Raises:
        AdapterkitError: an adapter does not fit the base.
    """
    tied = parse_tied(tied)
    config = base.config
    if isinstance(base, Dequantized) and base.scheme == "gguf" and not any(map(is_head, base.tensors)):
        # Follow llama.cpp, which ignores the config: without output.weight, it uses token_embd.weight as the head.
        config = {**(config or {}), "tie_word_embeddings": True}
    tie = find_tie(base.tensors, config)
    aliases = {} if tie is None else tie.aliases
    vocabulary = Vocabulary(base, aliases, parse_vocab(vocab))
    # Check the rules against the targets of all adapters together, because a rule may be meant for only one adapter.
    paths = [target.path for _, adapter, _ in adapters for target in adapter.updates]
    rules = parse_renames(rename, None if allow_partial else paths, [*base.tensors, *aliases])
    sources, folds = [], dict[str, list[PlannedUpdate]]()
    for position, (name, adapter, weight) in enumerate(adapters):
        _refuse_other_kinds(adapter)
        resize = partial(vocabulary.settle, position, name)
        bound = bind(adapter, base, partial=allow_partial, aliases=aliases, rename=rules, resize=resize, distinct=False)
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
        shapes |= {alias: shapes[name] for alias, name in aliases.items()}
        for site in sites_as_trained(bound.sites, bound.adapter.recipe, shapes):
            _refuse_other_kinds((site.target, update) for update in site.updates)
        sources.append(AdapterSource(name, adapter, bound.adapter, weight, bound.missing, bound.renamed, bound.rules))
        earlier = dict[str | None, list[Site]]()
        for site in bound.sites:
            before = earlier.setdefault(site.weight, [])
            for stored, fold in _folds(site, before, weight, position, base, aliases):
                shape = vocabulary.rows(position, stored, fold.shape)
                made_for = fold if shape == fold.shape else replace(fold, shape=shape)
                folds.setdefault(stored, []).append(made_for)
            before.append(site)
    base = vocabulary.grown()
    names = {name: name for name in base.tensors}
    bound_adapters = [source.adapter for source in sources]
    warnings = list(vocabulary.warnings)
    changes: dict[str, Any] = {}
    if tie is not None:
        rows = base.tensors[tie.stored].shape[0]
        changes = settle_tie(tie, folds, names, bound_adapters, tied, config, warnings, rows)
    elif tied != MERGE:
        refuse_tied_part(folds, base.tensors, config)
    changes |= vocabulary.config_changes(base.config, changes)
    # Look up each `SeenWeight.tensor` again: if the vocabulary grows, the tensor now has more rows.
    sorted_ = {name: tuple([_seen_in(base, fold) for fold in group]) for name, group in folds.items()}
    return Bindings(base, tuple(sources), sorted_, names, changes, warnings, vocabulary.record())


def _seen_in(base: Checkpoint, fold: PlannedUpdate) -> PlannedUpdate:
    if fold.seen is None:
        return fold
    return replace(fold, seen=replace(fold.seen, tensor=base.tensors[fold.seen.name]))


def _refuse_other_kinds(updates: Iterable[tuple[Target, Update]]) -> None:
    """Refuse updates that do not change weights.

    The caller checks twice. It checks before it resolves the names, to fail early. It checks again afterwards, because
    the kind of some updates depends on the base's shapes.
    """
    for target, update in updates:
        if update.kind not in ("additive", "weight"):
            why = f"{update.method} changes {update.acts_on}, not weights"
            raise NotMergeable(why, where=str(target), cure=INJECT_INSTEAD)


def _folds(
    site: Site, before: Sequence[Site], weight: float, position: int, base: Checkpoint, aliases: Mapping[str, str]
) -> list[tuple[str, PlannedUpdate]]:
    """Return a site's (stored tensor, planned update) pairs. `before` lists the earlier sites with the same weight."""
    folds = []
    for stored, bias in ((site.weight, False), (site.bias, True)):
        if stored is None:
            continue
        updates = tuple([u for u in site.updates if (u.changes_bias if bias else u.changes_weight)])
        if updates:
            shape = base.tensors[aliases.get(stored, stored)].shape
            fold = PlannedUpdate(site.target, updates, weight, position, bias, shape)
            if bias and site.weight is not None and any(update.bias_sees_weight for update in updates):
                fold = replace(fold, seen=_seen(site, before, weight, position, base, aliases))
            folds.append((stored, fold))
    return folds


def _seen(
    site: Site, before: Sequence[Site], weight: float, position: int, base: Checkpoint, aliases: Mapping[str, str]
) -> SeenWeight:
    assert site.weight is not None
    name = aliases.get(site.weight, site.weight)
    tensor = base.tensors[name]
    earlier = [
        PlannedUpdate(one.target, changing, weight, position, False, tensor.shape)
        for one in before
        if (changing := tuple(u for u in one.updates if u.changes_weight))
    ]
    return SeenWeight(name, tensor, tuple(earlier), site.updates)
