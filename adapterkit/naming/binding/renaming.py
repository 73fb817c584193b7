"""Rename the targets of an adapter by the user's rules, for verbs that bind no base.

Verbs that bind an adapter to a base pass the rules to the resolver, which reports them beside its own. All other
verbs rename the adapter itself, by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...errors import UsageError
from ..renames import Rename, parse_renames, renamed_by


def renamed(adapters: Sequence[Adapter], rename: str | Sequence[str | Rename]) -> list[Adapter]:
    """Rename the targets of adapters.

    Args:
        adapters: the adapters; each rule must match a target of at least one of them.
        rename: one rule or several, each `FROM=TO` or `@FILE`; the first that matches a target's name is used.

    Returns:
        the adapters in the same order; the lineage of each names the rules that changed it.

    Raises:
        UsageError: a rule cannot be read, or is about a base; or two targets of an adapter become one.
        TargetNotFound: a rule matches no target.
        StorageError, Malformed: a rules file cannot be read.
    """
    rules = parse_renames(rename, [target.path for adapter in adapters for target in adapter.updates])
    family = next((rule.text for rule in rules if rule.family or rule.rows), None)
    if family is not None:
        cure = (
            f"Leave --rename {family} (rename=) out here; give it to a verb that binds the adapter to a base, as merge"
        )
        raise UsageError(f"{family!r} says how a base is read, and none is read here", where="rename", cure=cure)
    return [_renamed(adapter, rules) for adapter in adapters] if rules else list(adapters)


def _renamed(adapter: Adapter, rules: Sequence[Rename]) -> Adapter:
    updates: dict[Target, tuple[Update, ...]] = {}
    used: dict[str, None] = {}
    for target, given in adapter.updates.items():
        path, rule = renamed_by(target.path, rules)
        new = replace(target, path=path)
        if new in updates:
            cure = "Correct --rename (rename=) so that every target keeps a name of its own"
            raise UsageError(f"two targets become {path}", where=str(target), cure=cure)
        updates[new] = given
        if rule is not None:
            used[rule.text] = None
    return adapter.replace(updates=updates).step("rename", rules=list(used)) if used else adapter
